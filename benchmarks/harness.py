"""Measures every operation by dlkernels/bench; writes the report into results/ and its table into README.md."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from dlkernels.bench.harness import BOTH, FORWARD, TORCH
from dlkernels.bench.report import markdown_table
from dlkernels.cli import run
from dlkernels.writing import write_text

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "results" / "cpu.md"
README = ROOT / "README.md"
SPEED_TABLE = re.compile(
    r"(?<=<!-- speed: written by benchmarks/harness\.py -->\n).*(?=<!-- end of speed -->)", re.DOTALL
)


def with_speed_table(readme: str, classes: list[dict[str, Any]]) -> str:
    """README with the ratios to torch of the ``classes`` of a report's JSON file between its two markers."""
    ratios: dict[str, dict[str, str]] = {}
    for entry in classes:
        ratios.setdefault(entry["label"], {})[entry["direction"]] = f"{entry['ratio'][TORCH]:.2f}"
    rows = [[label, *(by_direction.get(way, "") for way in (FORWARD, BOTH))] for label, by_direction in ratios.items()]
    table = "\n".join(markdown_table(["class", FORWARD, BOTH], rows))
    return SPEED_TABLE.sub(lambda _: f"\n{table}\n\n", readme)


if __name__ == "__main__":
    status = run(["bench", "--report", str(REPORT), "--plot", str(REPORT.with_suffix(".png")), *sys.argv[1:]])
    if status == 0:
        measured = json.loads(REPORT.with_suffix(".json").read_text(encoding="utf-8"))
        write_text(README, with_speed_table(README.read_text(encoding="utf-8"), measured["classes"]))
    sys.exit(status)
