"""The operations measured against torch's: cases by column, the harness, the report."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("rich") is None:
    raise ModuleNotFoundError("dlkernels.bench needs rich; run: pip install 'dlkernels[cli]'", name="rich")

from .compare import compare, comparison_table
from .harness import OURS, TORCH
from .report import PLOT_FORMATS, circumstances, merged, read_json, summary_table, write_json, write_plot, write_report
from .runner import DTYPES, HUGE_PAGES, MODES, PROVIDERS, BenchError, Run, run

__all__ = [
    "DTYPES",
    "HUGE_PAGES",
    "MODES",
    "OURS",
    "PLOT_FORMATS",
    "PROVIDERS",
    "TORCH",
    "BenchError",
    "Run",
    "circumstances",
    "compare",
    "comparison_table",
    "merged",
    "read_json",
    "run",
    "summary_table",
    "write_json",
    "write_plot",
    "write_report",
]
