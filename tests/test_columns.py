"""The house holds its shape: every operation has a file in every layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import COLUMNS

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    "csrc/cpu/{column}.h",
    "csrc/cpu/{column}.cc",
    "csrc/cuda/{column}.cu",
    "csrc/ops/{column}.h",
    "csrc/ops/{column}.cpp",
    "dlkernels/ops/{column}.py",
    "dlkernels/nn/{column}.py",
    "tests/cases/{column}.py",
    "tests/test_{column}.py",
    "dlkernels/bench/{column}.py",
    "benchmarks/bench_{column}.py",
    "docs/operations/{column}.md",
)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_has_a_file_in_every_layer(column: str, layer: str) -> None:
    assert (ROOT / layer.format(column=column)).is_file()


def test_no_column_is_missing_from_the_list() -> None:
    assert {path.stem for path in (ROOT / "csrc/ops").glob("*.cpp")} - {"device", "runtime"} == set(COLUMNS)
