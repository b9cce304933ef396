"""Measures cross_entropy against torch's; the options are those of `dlkernels bench`. Shapes: dlkernels/bench/cross_entropy.py."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "cross_entropy", *sys.argv[1:]]))
