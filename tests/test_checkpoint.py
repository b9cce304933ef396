"""Checkpoints: a run that is cut anywhere goes on as if it had not been, and no file is ever half there."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlkernels import cli, data, models, train
from dlkernels.models import registry
from dlkernels.train import CheckpointError, Progress, Trainer, TrainingError, checkpoint, generators
from dlkernels.train.optimizers import Schedule

from .cases.training import BUILDERS, load_once

safetensors_torch = pytest.importorskip("safetensors.torch")

ROOT = Path(__file__).resolve().parent.parent
RANDOM = {"dropout": 0.3, "noise": 0.1, "norm": True}  # draws from Python's, numpy's and torch's generators


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """The networks of ``cases/training.py`` can be named; runs share their data."""
    monkeypatch.setattr(data, "load", load_once)
    torch.set_num_threads(1)
    for name, builder in BUILDERS.items():
        monkeypatch.setitem(registry._builders, name, builder)


def prepared(network: str = "tinyclassifier", **settings: Any) -> Trainer:
    arguments = RANDOM if network == "tinyclassifier" else {}
    settings = {"epochs": 4, "batch_size": 300, **settings}
    return train.prepare(train.recipe(network, "synthetic", settings=settings, arguments=arguments, image_size=4))


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def numbers(progress: Progress) -> tuple[Any, ...]:
    """All of a step but the clock's."""
    return progress.step, progress.losses, progress.learning_rate, progress.validation


# Going on


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ("tinyclassifier", {}),
        ("tinyclassifier", {"optimizer": "sgd", "schedule": "plateau", "learning_rate": 1.0}),
        ("tinyclassifier", {"optimizer": "adagrad", "clip_norm": 0.5}),
        ("tinyclassifier", {"optimizer": "rmsprop", "learning_rate": 1e-3, "accumulate": 3}),
        ("tinyclassifier", {"optimizer": "adam", "learning_rate": 1e-2, "ema": 0.9}),
        ("tinyclassifier", {"optimizer": "adamw", "learning_rate": 1e-2, "amp": True}),
        ("tinyclassifier", {"patience": 1, "learning_rate": 2.0, "epochs": 9, "ema": 0.5}),
        ("tinyclassifier", {"mixup": 0.4}),
        ("tinyclassifier", {"cutmix": 1.0, "accumulate": 3, "label_smoothing": 0.2}),
        ("tinyclassifier", {"mixup": 0.4, "cutmix": 1.0, "cutout": 2}),
        ("tinygan", {}),
        ("tinycaptioner", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", [6, 8])  # after the first epoch, and within the second
def test_a_resumed_run_is_the_run_bit_for_bit(network: str, settings: dict[str, Any], cut: int, tmp_path: Path) -> None:
    whole = prepared(network, **settings)
    expected = [numbers(progress) for progress in whole.run()]
    started = prepared(network, **settings)
    steps = list(itertools.islice(checkpoint.saved(started.run(), started, tmp_path, {}, every=1), cut))
    resumed = prepared(network, **settings)
    for draw in (lambda: torch.rand(7), random.random, np.random.rand):  # another process stands elsewhere
        draw()
    checkpoint.resume(resumed, tmp_path)
    found = [numbers(progress) for progress in [*steps, *resumed.run()]]
    assert found == expected
    assert_same(resumed.state()[0], whole.state()[0])
    assert resumed.state()[1]["generators"] == whole.state()[1]["generators"]
    assert resumed.finish() == whole.finish()
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))


def test_a_learning_rate_that_a_plateau_has_reduced_stays_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Schedule, "PATIENCE", 1)
    settings = {"schedule": "plateau", "learning_rate": 3.0, "epochs": 12}
    whole = prepared(**settings)
    rates = [progress.learning_rate for progress in whole.run()]
    reduced = next(step for step, rate in enumerate(rates, 1) if rate < 3.0 and step > whole.schedule.warmup)
    assert reduced < len(rates) - 6
    started, resumed = prepared(**settings), prepared(**settings)
    list(itertools.islice(checkpoint.saved(started.run(), started, tmp_path, {}, every=1), reduced))
    checkpoint.resume(resumed, tmp_path)
    assert [progress.learning_rate for progress in resumed.run()] == rates[reduced:]


def test_every_generator_matters() -> None:
    """The network of the test above would notice each of them."""
    before = generators.states()
    found = []
    for disturb in (lambda: None, lambda: torch.rand(1), random.random, np.random.rand):
        trainer = prepared()
        generators.restore(before)
        disturb()
        (first,) = itertools.islice(trainer.run(), 1)
        found.append(first.losses["loss"])
    assert len(set(found)) == 4


def arguments(folder: Path, log: Path) -> list[str]:
    options = {"--epochs": "12", "--batch-size": "60", "--save-every": "7", "--patience": "50", "--ema": "0.9"}
    network = ["tinyclassifier", "--data", "synthetic", "--image-size", "4"]
    chosen = [text for name, value in RANDOM.items() for text in ("--set", f"{name}={str(value).lower()}")]
    places = ["--save", str(folder), "--log-file", str(log)]
    return ["train", *network, *chosen, *places, *(text for pair in options.items() for text in pair)]


def records(log: Path) -> list[dict[str, Any]]:
    """The lines of a log without what the clock says."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def start(*command: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "tests.cases.training", *command]
    return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(log: Path, lines: int, process: subprocess.Popen[bytes]) -> None:
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, (process.stderr and process.stderr.read()).decode()  # type: ignore[union-attr]
        time.sleep(0.001)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli.run(arguments(whole, tmp_path / "whole.jsonl")) == 0
    expected = capsys.readouterr().out
    log = tmp_path / "cut.jsonl"
    for command, lines in ((arguments(cut, log), 40), (["train", "--resume", str(cut)], 151)):
        process = start(*command)
        wait_for(log, lines, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        step = checkpoint.read(cut / checkpoint.LAST)[1]["state"]["step"]
        assert 0 < step < 360
    assert cli.run(["train", "--resume", str(cut)]) == 0
    for name in (checkpoint.LAST, checkpoint.BEST):
        tensors, facts = checkpoint.read(cut / name)
        expected_tensors, expected_facts = checkpoint.read(whole / name)
        assert_same(tensors, expected_tensors)
        assert facts.get("step") == expected_facts.get("step")
    assert records(log) == records(tmp_path / "whole.jsonl")
    test_line = "\ntest accuracy "
    assert (
        capsys.readouterr().out.split(test_line)[1].split(" after ")[0]
        == expected.split(test_line)[1].split(" after ")[0]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    run = Trainer.run

    def interrupted(trainer: Trainer):  # type: ignore[no-untyped-def]
        for progress in run(trainer):
            if progress.step == 9:
                os.kill(os.getpid(), number)
            yield progress

    monkeypatch.setattr(Trainer, "run", interrupted)
    assert cli.run(arguments(tmp_path / "cut", tmp_path / "log")) == 1
    error = capsys.readouterr().err
    assert error.startswith("dlkernels: interrupted at epoch 1, step 10 of 360, loss ")
    assert error.endswith(f"; go on with: dlkernels train --resume {tmp_path / 'cut'}\n")
    assert checkpoint.read(tmp_path / "cut" / checkpoint.LAST)[1]["state"]["step"] == 10
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_does_not_wait() -> None:
    trainer = prepared()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    with train.interrupt.stopping_on_signals(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        assert trainer.stop_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# Files


def test_the_folder_holds_the_last_state_and_the_best_weights(tmp_path: Path) -> None:
    trainer = prepared(learning_rate=1.0, epochs=8)
    validation = []
    for progress in checkpoint.saved(trainer.run(), trainer, tmp_path, {"network": "tinyclassifier"}):
        if progress.validation:
            validation.append(
                (progress.validation["loss"], {n: t.clone() for n, t in trainer.model.state_dict().items()})
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.BEST, checkpoint.LAST]
    best = int(np.argmin([loss for loss, _ in validation]))
    assert best < 7
    weights = safetensors_torch.load_file(tmp_path / checkpoint.BEST)
    assert_same(weights, validation[best][1])
    models.load_weights(trainer.model, weights)
    tensors, facts = checkpoint.read(tmp_path / checkpoint.LAST)
    assert facts["run"] == {"network": "tinyclassifier"}
    assert facts["state"]["step"] == trainer.step
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer"}


def test_a_network_without_a_validation_loss_keeps_its_latest_weights(tmp_path: Path) -> None:
    trainer = prepared("tinygan")
    list(checkpoint.saved(trainer.run(), trainer, tmp_path, {}))
    weights, facts = checkpoint.read(tmp_path / checkpoint.BEST)
    assert facts["step"] == trainer.step
    assert_same(weights, dict(trainer.model.state_dict()))


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("place", ["save_file", "fsync", "replace"])
def test_a_write_that_is_cut_leaves_the_old_file(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoint.write(path, {"a": torch.ones(3)}, {"step": 1})

    def crash(*arguments: object) -> None:
        if place == "save_file":
            Path(str(arguments[1])).write_bytes(b"half of a fi")
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch if place == "save_file" else os, place, crash)
        with pytest.raises(Crash):
            checkpoint.write(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, facts = checkpoint.read(path)
    assert torch.equal(tensors["a"], torch.ones(3)) and facts["step"] == 1
    assert list(tmp_path.iterdir()) == [path]
    checkpoint.write(path, {"a": torch.zeros(3)}, {"step": 2})
    assert checkpoint.read(path)[1]["step"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_content_reaches_the_disk_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(*paths: Any) -> None:
        events.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint.write(tmp_path / "file", {"a": torch.ones(3)}, {})
    assert events == ["file", "replace", tmp_path.name]


def test_weights_in_shared_or_strided_memory_are_stored(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    tensors = {"a": weight, "tied": weight, "transposed": weight.t(), "part": weight[2:], "empty": torch.empty(0, 3)}
    checkpoint.write(tmp_path / "file", tensors, {})
    found, _ = checkpoint.read(tmp_path / "file")
    assert_same(found, tensors)


def test_a_checkpoint_has_the_permissions_of_other_files(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "file", {}, {})
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"\x80\x04K\x01.",  # a pickle
        lambda content: safetensors_torch.save({"a": torch.ones(1)}),  # of another program
        lambda content: safetensors_torch.save({"a": torch.ones(1)}, {"dlkernels": "{"}),
    ],
)
def test_a_damaged_checkpoint_is_named(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / checkpoint.LAST
    checkpoint.write(path, {"a": torch.ones(3)}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="this is no checkpoint, or a damaged one") as caught:
        checkpoint.read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path / checkpoint.LAST}: there is no such checkpoint"):
        checkpoint.resume(prepared(), tmp_path)


def test_best_weights_that_do_not_belong_to_the_state_are_refused(tmp_path: Path) -> None:
    trainer = prepared(patience=5)
    list(checkpoint.saved(trainer.run(), trainer, tmp_path, {}))
    checkpoint.write(tmp_path / checkpoint.BEST, trainer.model.state_dict(), {"step": 1})
    with pytest.raises(CheckpointError, match="these weights are older than"):
        checkpoint.resume(prepared(patience=5), tmp_path)


def test_weights_of_another_network_are_named(tmp_path: Path) -> None:
    trainer = prepared()
    list(itertools.islice(checkpoint.saved(trainer.run(), trainer, tmp_path, {}, every=1), 1))
    other = train.prepare(train.recipe("tinyclassifier", "synthetic", image_size=4))
    with pytest.raises(CheckpointError, match=r"the weights have 'norm\.\w+', which TinyClassifier has not") as caught:
        checkpoint.resume(other, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / checkpoint.LAST}: ")


def test_a_state_of_no_run_of_the_command_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.write(tmp_path / checkpoint.LAST, {}, {"run": {"recipe": {"network": "lenet"}}})
    assert cli.run(["train", "--resume", str(tmp_path)]) == 1
    assert f"{tmp_path / checkpoint.LAST}: run has no 'device'\n" in capsys.readouterr().err


def test_other_data_and_other_ranks_are_refused(tmp_path: Path) -> None:
    trainer = prepared()
    list(itertools.islice(trainer.run(), 2))
    tensors, facts = trainer.state()
    with pytest.raises(TrainingError, match="the training examples are not those that the checkpoint was made with"):
        prepared(seed=1).load(tensors, facts)
    facts["generators"] *= 2
    with pytest.raises(TrainingError, match="the checkpoint was made by 2 processes, there are 1"):
        prepared().load(tensors, facts)


def test_nothing_in_the_package_unpickles_but_the_guarded_reader() -> None:
    words = ("import pickle", "pickle.load", "torch.load(", "torch.save(", "allow_pickle=True")
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "dlkernels").rglob("*.py")}
    assert {name for name, text in texts.items() if any(word in text for word in words)} == {"byte_arrays.py"}
