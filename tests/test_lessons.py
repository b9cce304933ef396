"""Every lesson runs in its short form, prints tables and writes pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "examples").glob("lecture_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_prints_what_was_learnt_and_writes_its_pictures(lesson: Path, tmp_path: Path) -> None:
    for library in ("captum", "kornia", "matplotlib", "optuna", "rich", "sklearn"):
        pytest.importorskip(library)
    done = subprocess.run(
        [sys.executable, str(lesson), "--fast", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "┃" in done.stdout
    assert all(picture.stat().st_size > 1000 for picture in tmp_path.glob("*.png"))
    assert list(tmp_path.glob("*.png"))
