"""Measures linear layers, as `dlkernels bench linear` does; the shapes are in dlkernels/bench/linear.py."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "linear", *sys.argv[1:]]))
