"""Measures conv2d against torch's; the options are those of `dlkernels bench`. Shapes: dlkernels/bench/conv2d.py."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "conv2d", *sys.argv[1:]]))
