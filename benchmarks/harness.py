"""Measures every operation by dlkernels/bench/harness.py; writes the report and its plot into results/."""

import sys
from pathlib import Path

from dlkernels.cli import run

RESULTS = Path(__file__).resolve().parent / "results"

if __name__ == "__main__":
    written = ["--report", str(RESULTS / "cpu.md"), "--plot", str(RESULTS / "cpu.png")]
    sys.exit(run(["bench", *written, *sys.argv[1:]]))
