"""Measures LSTMs, as `dlkernels bench lstm`, whose options it takes; the shapes are in dlkernels/bench."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "lstm", *sys.argv[1:]]))
