"""Full and read-only disks: an error names the file in one line, and leaves what was there and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dlkernels import bench, cli, visualize, writing
from dlkernels.train import Trainer, checkpoint, logs, search
from dlkernels.train.settings import Progress

from ..cases.bench_runs import measured_run

safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("typer")
pytestmark = pytest.mark.usefixtures("small_networks")

LARGE = errno.EFBIG  # what a limit on the size of files gives in the place of ENOSPC
LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """In it no file can become larger than ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, LIMIT[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMIT)


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], int]], None]:
    """Lets files grow no larger than so many bytes from a step of training on, until the command has failed."""
    run = Trainer.run

    def fill(step: int, size: Callable[[], int]) -> None:
        def filling(trainer: Trainer) -> Iterator[Progress]:
            for progress in run(trainer):
                if progress.step == step:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size(), LIMIT[1]))
                yield progress

        monkeypatch.setattr(Trainer, "run", filling)

    return fill


def arguments(folder: Path, *options: str) -> list[str]:
    network = ["tinyclassifier", "--data", "synthetic", "--image-size", "4", "--batch-size", "300", "--epochs", "2"]
    return ["train", *network, "--optimizer", "adam", "--save", str(folder), "--save-every", "4", *options]


def failing(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    try:
        assert cli.run(command) == 1
    finally:  # pytest writes its own line before a fixture would lift the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, LIMIT)
    error = capsys.readouterr().err
    assert error.startswith("dlkernels: ")
    assert error.count("\n") == 1
    return error.removeprefix("dlkernels: ").rstrip("\n")


def steps(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines() if "step" in json.loads(line)]


# Training


@pytest.mark.parametrize("what", ["checkpoint", "log", "board"])
def test_a_run_ends_with_its_last_checkpoint_whole_and_goes_on_from_there(
    what: str,
    tmp_path: Path,
    fill: Callable[[int, Callable[[], int]], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("tensorboard")
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    options = ["--tensorboard", str(folder / "board")] if what == "board" else ["--log-file", str(log)]
    run = Trainer.run
    assert cli.run(arguments(tmp_path / "whole")) == 0

    def room() -> int:
        if what == "checkpoint":
            return log.stat().st_size + 2000
        (file,) = [log] if what == "log" else (folder / "board").iterdir()
        return file.stat().st_size + 60

    fill(7 if what == "checkpoint" else 6, room)
    error = failing(capsys, arguments(folder, *options))
    place = {"checkpoint": folder / checkpoint.LAST, "log": log, "board": folder / "board"}[what]
    assert error.startswith(str(place))
    assert f"{os.strerror(LARGE)}, at step " in error
    assert error.endswith(f"go on with: dlkernels train --resume {folder}")
    kept = {checkpoint.LAST} | ({"board"} if what == "board" else set())
    assert {path.name for path in folder.iterdir()} - {checkpoint.BEST} == kept
    assert checkpoint.read(folder / checkpoint.LAST)[1]["state"]["step"] == (6 if what == "checkpoint" else 4)
    if what != "board":
        assert steps(log) == list(range(1, (9 if what == "checkpoint" else 6)))
    monkeypatch.setattr(Trainer, "run", run)
    assert cli.run(["train", "--resume", str(folder)]) == 0
    ours, expected = (checkpoint.read(path / checkpoint.LAST)[0] for path in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert what == "board" or steps(log) == list(range(1, 13))


def test_a_run_without_a_checkpoint_says_so(
    tmp_path: Path, fill: Callable[[int, Callable[[], int]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(4, lambda: 100)
    error = failing(capsys, arguments(tmp_path / "run"))
    path = tmp_path / "run" / checkpoint.LAST
    assert error == f"{path}: {os.strerror(LARGE)}, at step 4 of 12; {tmp_path / 'run'} has no checkpoint yet"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("option", ["--log-file", "--tensorboard"])
def test_what_takes_nothing_ends_the_run_before_its_first_step(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    path = "/dev/full" if option == "--log-file" else str(tmp_path / "file")
    error = failing(capsys, arguments(tmp_path / "run", option, path))
    assert error.startswith(f"{path}: ")


@pytest.mark.parametrize("place", ["mkdir", "fsync", "replace", "chmod", "save_file"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_write_that_fails_leaves_the_old_file_alone(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, {"a": torch.ones(3)}, {"step": 1})

    def fail(*arguments: object, **options: object) -> None:
        if place == "save_file":  # which has an error of its own
            Path(str(arguments[1])).write_bytes(b"half of a fi")
            raise safetensors.SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch if place == "save_file" else os, place, fail)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            checkpoint.write(path, {"a": torch.zeros(3)}, {"step": 2})
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    tensors, facts = checkpoint.read(path)
    assert torch.equal(tensors["a"], torch.ones(3)) and facts["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_that_does_not_fit_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with writing.Records(path) as file:
        file.append(b"first\n")
        with at_most(10), pytest.raises(OSError, match=os.strerror(LARGE)) as caught:
            file.append(b"second, longer\n")
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"first\n"
        file.append(b"third\n")
    assert path.read_bytes() == b"first\nthird\n"


def test_the_last_line_of_a_log_does_not_fit(tmp_path: Path) -> None:
    with at_most(5), pytest.raises(OSError, match=os.strerror(LARGE)) as caught:
        logs.conclude(tmp_path / "log", {"accuracy": 1.0})
    assert caught.value.filename == str(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == b""


# What else is written


@pytest.mark.parametrize("exists", [False, True])
def test_bench_writes_what_fits_and_names_the_rest(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "run", lambda *arguments, **options: measured_run())
    paths = {
        option: tmp_path / name for option, name in (("--json", "a.json"), ("--plot", "b.png"), ("--report", "c.md"))
    }
    if exists:
        for path in paths.values():
            path.write_text("before")
    with at_most(500):
        error = failing(capsys, ["bench", *(text for pair in paths.items() for text in map(str, pair))])
    assert error == "; ".join(f"{path}: {os.strerror(LARGE)}" for path in paths.values())
    assert {path.name for path in tmp_path.iterdir()} == ({"a.json", "b.png", "c.md"} if exists else set())
    assert all(path.read_text() == "before" for path in paths.values() if exists)
    paths["--plot"].unlink(missing_ok=True)
    paths["--plot"].symlink_to("/dev/full")
    error = failing(capsys, ["bench", *(text for pair in paths.items() for text in map(str, pair))])
    assert error == f"{paths['--plot']}: {os.strerror(errno.ENOSPC)}"
    assert json.loads(paths["--json"].read_text())["results"]


@pytest.mark.parametrize("option", ["--json", "--plot", "--report"])
def test_bench_measures_nothing_that_it_cannot_write(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run", lambda *arguments, **options: pytest.fail("something was measured"))
    path = tmp_path / ("folder.png" if option == "--plot" else "folder")
    path.mkdir()
    assert failing(capsys, ["bench", option, str(path)]) == f"{path}: Is a directory"


def test_bench_writes_through_links_and_to_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    bench.write_json(measured_run(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "target").read_text())["results"]
    bench.write_json(measured_run(), Path("/dev/null"))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        bench.write_json(measured_run(), Path("/dev/full"))
    assert caught.value.filename == "/dev/full"


def test_a_figure_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, _ = visualize.figures.plot("a title", "x", "y")
    path = tmp_path / "figure.png"
    with at_most(300), pytest.raises(OSError, match=os.strerror(LARGE)) as caught:
        visualize.save(figure, path)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    visualize.save(figure, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_search_names_a_storage_that_it_cannot_use(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    path = tmp_path / "searches.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(OSError, match="file is not a database") as caught:
        search.random_search(lambda parameters: 0.0, {"rate": (0.1, 1.0)}, 1, storage=path)
    assert caught.value.filename == str(path)


def test_output_that_nobody_takes_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert cli.run(["info", "--json"]) == 1
    assert capsys.readouterr().err == f"dlkernels: standard output: {os.strerror(errno.ENOSPC)}\n"


# Real disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where one can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("this user may not mount file systems")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_ends_the_run(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (small_disk / "other").write_bytes(bytes(190_000))
    error = failing(capsys, arguments(small_disk / "run", "--set", "hidden_features=64"))
    assert error.startswith(f"{small_disk / 'run'}/")
    assert f"{os.strerror(errno.ENOSPC)}, at step " in error
    assert all(path.name in (checkpoint.LAST, checkpoint.BEST) for path in (small_disk / "run").iterdir())


def test_a_disk_that_is_read_only_ends_the_run_at_once(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments(small_disk / "run")) == 0
    last = (small_disk / "run" / checkpoint.LAST).read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for path in (small_disk / "other", small_disk / "run" / "log"):
        option = ["--save", str(path)] if path.name == "other" else ["--log-file", str(path)]
        error = failing(capsys, arguments(small_disk.parent / path.name, *option))
        assert error == f"{path}: {os.strerror(errno.EROFS)}"
    assert cli.run(["train", "--resume", str(small_disk / "run")]) == 0  # it has ended: nothing is to be written
    assert (small_disk / "run" / checkpoint.LAST).read_bytes() == last
