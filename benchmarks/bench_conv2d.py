"""Measures convolutions, as `dlkernels bench conv2d`, whose options it takes; the shapes are in dlkernels/bench."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "conv2d", *sys.argv[1:]]))
