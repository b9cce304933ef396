"""docs/support.md counts the tests that there are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "support_matrix.py"


@pytest.fixture(scope="module")
def matrix() -> Any:
    location = importlib.util.spec_from_file_location("support_matrix", SCRIPT)
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    check = subprocess.run([sys.executable, str(SCRIPT), "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


@pytest.fixture
def recorder(matrix: Any) -> Any:
    recorder = matrix.Recorder()
    for operation in matrix.OPERATIONS:
        recorder.collected.update(Counter({("export", operation): 3, (f"{operation}, float32", "baseline"): 2}))
    recorder.passed.update(recorder.collected)
    recorder.passed["export", "lstm"] = 1
    return recorder


def test_a_cell_says_how_many_tests_passed(matrix: Any, recorder: Any) -> None:
    text = matrix.document(recorder)
    assert "| export | 3 | 3 | 1 of 3 | 3 | 3 | 3 | 3 |\n" in text
    assert "| vmap | – | – | – | – | – | – | – |\n" in text
    assert "| attention, float32 | 2 |\n" in text
    assert matrix.written(text) == recorder.collected


def test_differences_name_their_cells(matrix: Any, recorder: Any) -> None:
    text = matrix.document(recorder)
    assert matrix.differences(recorder, text) == []
    recorder.collected["compile", "linear"] += 1
    del recorder.collected["attention, float32", "baseline"]
    recorder.collected["conv2d, float32", "of another machine"] = 5
    assert matrix.differences(recorder, text) == [
        "attention, float32, baseline: 2 in the page, 0 collected",
        "compile, linear: 0 in the page, 1 collected",
    ]
