"""Measures lstm against torch's; the options are those of `dlkernels bench`. Shapes: dlkernels/bench/lstm.py."""

import sys

from dlkernels.cli import run

if __name__ == "__main__":
    sys.exit(run(["bench", "lstm", *sys.argv[1:]]))
