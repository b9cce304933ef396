"""Measures attention against torch's; the options are those of `dlkernels bench`. Shapes: dlkernels/bench/attention.py."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "attention", *sys.argv[1:]]))
