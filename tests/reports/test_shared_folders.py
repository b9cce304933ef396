"""Two runs in one folder: the second is refused, and a run that has died keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from dlkernels import cli
from dlkernels.train import CheckpointError, checkpoint
from dlkernels.writing import Records

pytest.importorskip("safetensors")
pytest.importorskip("typer")
pytestmark = pytest.mark.usefixtures("small_networks")


def arguments(folder: Path, *options: str) -> list[str]:
    network = ["tinyclassifier", "--data", "synthetic", "--image-size", "4", "--batch-size", "300", "--epochs", "1"]
    return ["train", *network, "--save", str(folder), *options]


def test_a_second_run_is_refused_before_it_writes_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    log.write_text("of the first")
    with checkpoint.held(folder):
        assert cli.run(arguments(folder, "--log-file", str(log))) == 1
        assert [path.name for path in folder.iterdir()] == [checkpoint.LOCK]
    assert capsys.readouterr().err == f"dlkernels: {folder}: another run is saving into this folder\n"
    assert log.read_text() == "of the first"
    assert list(folder.iterdir()) == []


def test_a_run_that_goes_on_is_alone_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--epochs", "2", "--patience", "1"]
    assert cli.run(arguments(tmp_path / "run", *steps)) == 0
    tensors, facts = checkpoint.read(tmp_path / "run" / checkpoint.LAST)
    facts["state"].update(step=6, best_step=6)  # as if half of it were left
    checkpoint.write(tmp_path / "run" / checkpoint.LAST, tensors, facts)
    before = (tmp_path / "run" / checkpoint.LAST).read_bytes()
    capsys.readouterr()
    with checkpoint.held(tmp_path / "run"):
        assert cli.run(["train", "--resume", str(tmp_path / "run")]) == 1
    assert "another run is saving into this folder" in capsys.readouterr().err
    assert (tmp_path / "run" / checkpoint.LAST).read_bytes() == before


def test_a_folder_is_free_after_a_run(tmp_path: Path) -> None:
    assert cli.run(arguments(tmp_path / "run")) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [checkpoint.BEST, checkpoint.LAST]
    with checkpoint.held(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_folder_is_free_once_its_run_has_died(number: signal.Signals, tmp_path: Path) -> None:
    ready, child_ready = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with checkpoint.held(tmp_path):
            os.write(child_ready, b"x")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(CheckpointError, match="another run is saving into this folder"), checkpoint.held(tmp_path):
        pass
    os.kill(child, number)
    os.waitpid(child, 0)
    assert (tmp_path / checkpoint.LOCK).exists()
    with checkpoint.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_keeps_nobody_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cli.run(arguments(tmp_path / "run", "--log-file", str(tmp_path / "log"))) == 0


def test_a_lock_that_was_taken_away_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ends between our opening and locking it; who comes next makes another file."""
    flock, calls = fcntl.flock, []

    def late(*arguments: int) -> None:
        if not calls:
            (tmp_path / checkpoint.LOCK).unlink()
        calls.append(arguments)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with checkpoint.held(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / checkpoint.LOCK).exists()


def test_two_runs_do_not_write_to_one_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    with Records(log) as file:
        file.append(b"of the first\n")
        assert cli.run(arguments(tmp_path / "run", "--log-file", str(log))) == 1
    assert capsys.readouterr().err == f"dlkernels: {log}: another run is writing to this file\n"
    assert log.read_bytes() == b"of the first\n"
