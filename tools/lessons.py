"""Writes docs/lessons.md: the text of each lesson, its command, what it printed, and its pictures.

``python tools/lessons.py`` runs all of examples/lecture_*.py in full, ``python tools/lessons.py lecture_12_attention``
one alone, which leaves sections and pictures of the others as they are. Pictures go to docs/lessons.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
DOCUMENT = ROOT / "docs" / "lessons.md"
PICTURES = ROOT / "docs" / "lessons"

COLUMNS = 88  # of what lessons print
MOST_BYTES = 60_000  # of a picture, if it can be seen in so few
WIDTHS = (1200, 1000, 800)  # of one that takes more in its own
WROTE = re.compile(r"^wrote runs/\w+/(\w+\.png)$", re.MULTILINE)
HEADING = re.compile(r"^## .*\{ #(lecture_\w+) \}$", re.MULTILINE)

TITLE = """\
# Lessons

Each lecture of the course as a program, with what it printed and drew. All run within two minutes on one core and need
no data beside what comes with scikit-learn and Python (`pip install ".[course]"`); `--fast` takes a few seconds, in
which less is learnt, and `--output FOLDER` says where the pictures go. Written by `python tools/lessons.py`, which runs
them.
"""


def lessons() -> list[str]:
    """The names of all lessons, in the order of the lectures."""
    return sorted(path.stem for path in EXAMPLES.glob("lecture_*.py"))


def heading(name: str) -> str:
    """``lecture_08_seeing_inside`` to ``## Lecture 8: seeing inside``, with the name as its anchor."""
    _, number, *topic = name.split("_")
    return f"## Lecture {int(number)}: {' '.join(topic)} {{ #{name} }}"


def about(name: str) -> str:
    """What a lesson says of itself: its docstring without the name of the lecture and the command.

    Raises:
        ValueError: it has another form.
    """
    docstring = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    parts = re.fullmatch(r"Lecture \d+: (.+?)\n\nRun it: .*", docstring or "", re.DOTALL)
    if parts is None:
        raise ValueError(f"the docstring of examples/{name}.py must be 'Lecture N: ...' and at its end 'Run it: ...'")
    return parts[1][0].upper() + parts[1][1:]


def run(name: str, folder: Path) -> str:
    """Runs a lesson in a folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").split("\n"))


def save_small(source: Path, target: Path) -> None:
    """Writes a picture in 128 colours, and smaller where it would take too many bytes."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    for width in (picture.width, *(width for width in WIDTHS if width < picture.width)):
        smaller = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.BOX)
        smaller.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=3).save(target, optimize=True)
        if target.stat().st_size <= MOST_BYTES:
            return


def section(name: str) -> str:
    """Runs a lesson; its section without the heading. Its pictures replace those that it had."""
    with tempfile.TemporaryDirectory() as folder:
        output = run(name, Path(folder))
        pictures = sorted(Path(folder).glob("runs/*/*.png"))
        shutil.rmtree(PICTURES / name, ignore_errors=True)
        (PICTURES / name).mkdir(parents=True)
        for picture in pictures:
            save_small(picture, PICTURES / name / picture.name)
    command = f"```\npython examples/{name}.py\n```"
    return "\n\n".join([about(name), command, *illustrated(name, output, [path.name for path in pictures])])


def illustrated(name: str, output: str, pictures: list[str]) -> list[str]:
    """What a lesson printed, with its pictures where it wrote them, or at the end if it did not say so."""
    image = "![{}](lessons/" + name + "/{}){{ loading=lazy }}"
    parts = []
    for index, part in enumerate(WROTE.split(output)):
        if index % 2 == 1:
            parts.append(image.format(part.removesuffix(".png"), part))
        elif part.strip("\n"):
            parts.append("````text\n" + part.strip("\n") + "\n````")
    said = WROTE.findall(output)
    return parts + [image.format(path.removesuffix(".png"), path) for path in pictures if path not in said]


def sections(text: str) -> dict[str, str]:
    """The sections of a document by the names of their lessons, without their headings."""
    _, *parts = HEADING.split(text)
    return {name: body.strip("\n") for name, body in zip(parts[::2], parts[1::2], strict=True)}


def document(bodies: dict[str, str]) -> str:
    """The document of these sections, in the order of the lectures."""
    parts = [f"{heading(name)}\n\n{bodies[name]}\n" for name in sorted(bodies)]
    return "\n".join([TITLE, *parts])


def main() -> None:
    """Runs the lessons that are named, or all."""
    parser = argparse.ArgumentParser(description="Runs lessons and writes their sections of docs/lessons.md.")
    parser.add_argument("names", nargs="*", metavar="lesson", help=f"all if not given: {', '.join(lessons())}")
    names = parser.parse_args().names
    if unknown := set(names) - set(lessons()):
        parser.error(f"there is no lesson {', '.join(sorted(unknown))}")
    before = sections(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else {}
    bodies = {name: body for name, body in before.items() if name in lessons()}
    for name in names or lessons():
        bodies[name] = section(name)
        DOCUMENT.write_text(document(bodies), encoding="utf-8")  # what was run stays, whatever comes after it
        print(f"{name}: {len(list((PICTURES / name).iterdir()))} pictures")


if __name__ == "__main__":
    main()
