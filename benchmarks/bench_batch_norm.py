"""Measures batch_norm against torch's; the options are those of `dlkernels bench`. Shapes: dlkernels/bench/batch_norm.py."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "batch_norm", *sys.argv[1:]]))
