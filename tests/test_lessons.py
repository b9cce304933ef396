"""Every lesson runs in its short form, prints tables and writes pictures; docs/lessons.md has them all."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "examples").glob("lecture_*.py"))


@pytest.fixture(scope="module")
def tool() -> Any:
    """tools/lessons.py."""
    pytest.importorskip("PIL")
    location = importlib.util.spec_from_file_location("lessons_script", ROOT / "tools" / "lessons.py")
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


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


def test_the_document_has_every_lesson_as_it_describes_itself(tool: Any) -> None:
    sections = tool.sections(tool.DOCUMENT.read_text(encoding="utf-8"))
    assert list(sections) == [lesson.stem for lesson in LESSONS], "run python tools/lessons.py with what is missing"
    for name, body in sections.items():
        assert body.startswith(tool.about(name) + "\n"), f"run python tools/lessons.py {name}"
        assert f"python examples/{name}.py\n" in body


def test_the_document_shows_the_pictures_that_there_are(tool: Any) -> None:
    text = tool.DOCUMENT.read_text(encoding="utf-8")
    shown = {tool.DOCUMENT.parent / path for path in re.findall(r"^!\[\w+\]\((\S+)\)", text, re.MULTILINE)}
    assert shown == set(tool.PICTURES.rglob("*.*"))


def test_a_document_is_read_as_it_was_written(tool: Any) -> None:
    bodies = {"lecture_02_a_b": "One\n\n## no lesson\n\nend", "lecture_10_c": "Two"}
    text = tool.document(dict(reversed(bodies.items())))
    assert "\n## Lecture 2: a b { #lecture_02_a_b }\n\nOne\n" in text
    assert list(tool.sections(text).items()) == list(bodies.items())


def test_pictures_stand_where_they_were_written(tool: Any) -> None:
    output = "one\nwrote runs/lecture_02/a.png\nwrote runs/lecture_02/b.png\n\ntwo"
    image = "![{0}](lessons/lecture_02_x/{0}.png){{ loading=lazy }}".format
    assert tool.illustrated("lecture_02_x", output, ["a.png", "b.png", "c.png"]) == [
        "````text\none\n````",
        image("a"),
        image("b"),
        "````text\ntwo\n````",
        image("c"),
    ]


@pytest.mark.parametrize(
    ("width", "most_bytes", "expected"), [(1300, 60_000, 1300), (1300, 16_000, 1000), (1300, 100, 800), (600, 100, 600)]
)
def test_pictures_are_made_small(
    tool: Any, width: int, most_bytes: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "MOST_BYTES", most_bytes)
    noise = bytes(torch.randint(256, (3 * width * 20,)).tolist())
    tool.Image.frombytes("RGB", (width, 20), noise).save(tmp_path / "large.png")
    tool.save_small(tmp_path / "large.png", tmp_path / "small.png")
    with tool.Image.open(tmp_path / "small.png") as small:
        assert small.size == (expected, round(20 * expected / width))
        assert len(small.getcolors()) <= 128
