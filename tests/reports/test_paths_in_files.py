"""Paths and names that a file gives: a run that is resumed writes only where its user or its own folder says."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlkernels import cli, data
from dlkernels.data import DataError
from dlkernels.train import checkpoint

pytest.importorskip("safetensors")
pytest.importorskip("typer")
pytestmark = pytest.mark.usefixtures("small_networks")


def train(folder: Path, *options: str) -> None:
    """A run of two epochs, of which the first is kept."""
    network = ["tinyclassifier", "--data", "synthetic", "--image-size", "4", "--batch-size", "300", "--epochs", "2"]
    assert cli.run(["train", *network, "--save", str(folder), *options]) == 0


@pytest.fixture(scope="module")
def finished() -> list[Path]:
    """The folder of a run, once there is one."""
    return []


@pytest.fixture
def run(finished: list[Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, a copy for each test."""
    if not finished:
        finished.append(tmp_path_factory.mktemp("run") / "run")
        train(finished[0])
    return shutil.copytree(finished[0], tmp_path / "run")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Writes the last checkpoint again with other facts, as somebody may who hands it on."""
    tensors, facts = checkpoint.read(folder / checkpoint.LAST)
    change(facts)
    checkpoint.write(folder / checkpoint.LAST, tensors, facts)


def claim(folder: Path, option: str, path: str) -> None:
    """Lets the checkpoint say that the run logs to ``path``."""
    rewrite(folder, lambda facts: facts["run"].update({option: path}))


def resumed(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, str]:
    """Exit status of a resumed run, and its line of error."""
    capsys.readouterr()
    status = cli.run(["train", "--resume", str(folder), *options])
    error = capsys.readouterr().err
    assert error.count("\n") <= 1
    return status, error


CONTENTS = {
    "a text": "export PATH=/usr/bin\n",
    "no file": None,
    "an empty file": "",
    "another log": '{"step": 1, "seconds": 0.5}\n{"step": 2, "seconds": 0.7}\n',
    "a log with the last step": "".join(f'{{"step": {step}, "seconds": 0.5}}\n' for step in range(1, 13)),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("spelling", ["{file}", "../victim", "inside/../../victim", "link", "linked/victim"])
def test_no_foreign_log_is_written_to(
    content: str | None, spelling: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = run.parent / "victim"
    if content is not None:
        victim.write_text(content)
    (run / "inside").mkdir()
    (run / "link").symlink_to(victim)
    (run / "linked").symlink_to(run.parent)
    claim(run, "log_file", spelling.format(file=victim))
    status, error = resumed(capsys, run)
    assert status == 1
    assert f"{run / checkpoint.LAST} says that the run writes to {victim}, which has not this run's steps" in error
    assert "--log-file" in error
    assert (victim.read_text() if victim.exists() else None) == content


@pytest.mark.parametrize("spelling", ["{file}", "../board", "link"])
def test_nothing_is_written_for_tensorboard_outside_of_the_folder(
    spelling: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (run / "link").symlink_to(run.parent / "board")
    claim(run, "tensorboard", spelling.format(file=run.parent / "board"))
    status, error = resumed(capsys, run)
    assert status == 1
    assert f"writes to {run.parent / 'board'}, which is outside of the run's folder" in error
    assert "--tensorboard" in error
    assert not (run.parent / "board").exists()


def test_the_command_line_says_where_to_write(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim(run, "log_file", "/etc/passwd")
    log = run.parent / "new.jsonl"
    assert resumed(capsys, run, "--log-file", str(log)) == (0, "")
    assert "test_accuracy" in json.loads(log.read_text())


def test_a_log_given_by_mistake_is_not_cut(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parent / "notes"
    other.write_text("mine\n")
    status, error = resumed(capsys, run, "--log-file", str(other))
    assert status == 1
    assert error.startswith(f"dlkernels: {other}, line 1: this is no record of a step")
    assert other.read_text() == "mine\n"


@pytest.mark.parametrize("place", ["run/log.jsonl", "log.jsonl"])
def test_a_run_goes_on_with_its_own_log(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / place
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", "--log-file", str(log))
    before = log.read_text()
    assert resumed(capsys, tmp_path / "run") == (0, "")
    assert log.read_text() == before


def test_a_folder_that_was_moved_takes_its_log_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    train(tmp_path / "run", "--log-file", str(tmp_path / "run" / "log.jsonl"))
    (tmp_path / "run").rename(tmp_path / "moved")
    before = (tmp_path / "moved" / "log.jsonl").read_text()
    assert resumed(capsys, tmp_path / "moved") == (0, "")
    assert (tmp_path / "moved" / "log.jsonl").read_text() == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [".last.safetensors.unfinished", ".lock", "last.safetensors"])
def test_links_in_the_folder_of_a_run_are_not_followed(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    network = ["tinyclassifier", "--data", "synthetic", "--image-size", "4", "--batch-size", "300", "--epochs", "1"]
    cli.run(["train", *network, "--save", str(tmp_path / "run")])
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("special", ["pipe", "/dev/zero", "folder"])
def test_data_is_read_from_files_alone(kind: str, special: str, tmp_path: Path) -> None:
    """Not from pipes, which may never give anything, or devices, which may never end."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    path = tmp_path / "a" / "image.png"
    if special == "pipe":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    else:
        path.symlink_to(special)
    with pytest.raises(DataError, match=f"{path}: expected a file"):
        data.load(path if kind == "text" else tmp_path, kind)


@pytest.mark.parametrize(
    ("name", "value"),
    [("network", "os.system"), ("network", "../lenet"), ("backend", "subprocess"), ("source", "/no/such/folder")],
)
def test_names_are_looked_up_among_those_that_are_known(
    name: str, value: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run, lambda facts: facts["run"]["recipe"].update({name: value}))
    status, error = resumed(capsys, run)
    assert status == 1
    assert error.startswith(f"dlkernels: {run / checkpoint.LAST}: ")
    assert value in error


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;title\x07", "a\rb", "\ud800"])
def test_what_controls_a_terminal_is_shown_as_text(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(run, lambda facts: facts["run"].update({text: 1}))
    status, error = resumed(capsys, run)
    assert status == 1
    assert error.rstrip("\n").isprintable()
