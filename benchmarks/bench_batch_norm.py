"""Measures batch norm, as `dlkernels bench batch_norm`, whose options it takes; the shapes are in dlkernels/bench."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "batch_norm", *sys.argv[1:]]))
