"""Measures losses of linear layers, as `dlkernels bench linear_cross_entropy` does; shapes are in dlkernels/bench."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "linear_cross_entropy", *sys.argv[1:]]))
