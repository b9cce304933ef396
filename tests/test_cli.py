"""The command line: what it prints and writes, its exit status, and one line for every error."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console

pytest.importorskip("typer")

import dlkernels
from dlkernels import bench, cli, commands, info, models, train
from dlkernels.commands.train import train_command
from dlkernels.operations import OPERATIONS
from dlkernels.train import Progress, show

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def keep_threads(threads: None) -> None:
    """The commands set torch's number of threads."""


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status of a command that fails, and the one line that it wrote to standard error."""
    status = cli.run(list(arguments))
    error = capsys.readouterr().err
    assert error.startswith("dlkernels: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return status, error


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_info_names_versions_and_tests_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info"]) == 0
    out = capsys.readouterr().out
    assert dlkernels.__version__ in out
    assert torch.__version__ in out
    assert dlkernels._C.isa() in out
    for name in ("conv2d", "batch_norm", "lstm", "cross_entropy", "attention"):
        assert f"{name}: ok" in out


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isa"] in facts["available_isas"]
    assert facts["build"]["torch"] == facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["ok"] is True
    assert [check["name"] for check in facts["self_test"]] == list(OPERATIONS)
    assert all(check["error"] <= check["bound"] for check in facts["self_test"])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda input, target: input.sum() * 1e-3, ""),
        (lambda input, target: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "raises"],
)
def test_info_fails_when_an_operation_does(broken, message, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(info.functional, "cross_entropy", broken)
    status, error = failing(capsys, "info")
    assert status == 1
    assert error == "dlkernels: the self-test failed: cross_entropy\n"
    (check,) = [check for check in info.self_test() if not check.passed]
    assert check.message == message


def test_info_without_build_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dlkernels._build_info", None)
    assert info.build_facts() == {}


def test_train_prints_epochs_and_shares(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    arguments = ["train", "lenet", "--data", "digits", "--epochs", "2", "--batch-size", "128", "--log-file", str(log)]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "lenet on digits: 1294 examples to train, 144 to validate, 359 to test; dlkernels, cpu, threads"
    )
    assert "epoch   1/2" in out
    assert "epoch   2/2" in out
    assert "test accuracy" in out
    for name in ("conv2d", "batch_norm", "cross_entropy", "everything else"):
        assert name in out
    *records, last = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 21))
    assert {record["steps"] for record in records} == {20}
    assert [record["step"] for record in records if "validation_accuracy" in record] == [10, 20]
    assert records[-1]["loss"] < records[0]["loss"]
    assert f"test accuracy {last['test_accuracy']:.4f}, loss {last['test_loss']:.4f} after " in out


def test_train_counts_every_call_on_its_backend(capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("dlkernels", "torch"):
        assert cli.run(["train", "lenet", "--epochs", "1", "--batch-size", "256", "--backend", backend]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        here, _, total, *_ = last.split()
        assert last.endswith("calls of conv2d, batch_norm, linear, cross_entropy ran on dlkernels")
        assert int(total) >= 16  # those of a step
        assert int(here) == (int(total) if backend == "dlkernels" else 0)


def test_train_sets_the_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "lenet", "--epochs", "1", "--batch-size", "700", "--threads", "2"]) == 0
    assert torch.get_num_threads() == 2
    assert "threads 2" in capsys.readouterr().out


def test_every_setting_has_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[train.Recipe] = []

    def prepare(recipe: train.Recipe, device: object) -> None:
        given.append(recipe)
        raise train.TrainingError("seen")

    monkeypatch.setattr(train, "prepare", prepare)
    settings: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 8,
        "accumulate": 2,
        "optimizer": "rmsprop",
        "learning_rate": 0.3,
        "scale_rate": 16,
        "momentum": 0.8,
        "weight_decay": 0.2,
        "schedule": "plateau",
        "warmup": 0.25,
        "label_smoothing": 0.15,
        "mixup": 0.4,
        "cutmix": 1.5,
        "cutout": 3,
        "clip_norm": 2.5,
        "ema": 0.99,
        "patience": 4,
        "seed": 7,
    }
    options = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    sets = ["--set", "image_size=12", "--set", "num_classes=11"]
    others = ["--image-size", "12", "--backend", "torch"]
    assert cli.run(["train", "lenet", *options, "--amp", *sets, *others]) == 1
    (recipe,) = given
    assert recipe.settings == train.Settings(amp=True, **settings)
    assert recipe.arguments == {"image_size": 12, "num_classes": 11}
    assert (recipe.image_size, recipe.backend) == (12, "torch")


def test_torchrun_leaves_every_option_to_the_command() -> None:
    """torchrun takes an option of the program for its own where it is the beginning of one."""
    run = pytest.importorskip("torch.distributed.run")
    names = [name for name in inspect.signature(train_command).parameters if name != "network"]
    for option in map(commands.job.option, names):
        arguments = ["--nproc-per-node", "2", "-m", "dlkernels", "train", option, "value"]
        parsed = run.get_args_parser().parse_args(arguments)
        assert parsed.training_script_args == ["train", option, "value"], option


@pytest.fixture
def saved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run of two epochs."""
    pytest.importorskip("safetensors")
    options = ["--epochs", "2", "--batch-size", "200", "--set", "num_classes=12"]
    assert cli.run(["train", "lenet", *options, "--save", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_finished_run_tells_its_figures_again(saved_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "--resume", str(saved_run)]) == 0
    out = capsys.readouterr().out
    assert "epoch" not in out
    assert "test accuracy 0." in out


def test_options_beside_resume_must_be_those_of_the_run(saved_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ["--epochs", "2", "--data", "digits", "--set", "num_classes=12", "--save", str(saved_run), "--threads", "1"]
    assert cli.run(["train", "lenet", *same, "--resume", str(saved_run)]) == 0
    for option, value, words in (
        ("--epochs", "3", "--epochs: it was 2 when the run started, got 3"),
        ("--data", "synthetic", "--data: it was digits when the run started, got synthetic"),
        ("--set", "num_classes=13", "--set: it was {'num_classes': 12} when the run started, got {'num_classes': 13}"),
        ("--save", "elsewhere", f"--save: it was {saved_run} when the run started, got {ROOT / 'elsewhere'}"),
        ("--patience", "2", "--patience: it was None when the run started, got 2"),
    ):
        status, error = failing(capsys, "train", "--resume", str(saved_run), option, value)
        assert status == 2
        assert words in error


def test_a_run_is_not_written_over(saved_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, error = failing(capsys, "train", "lenet", "--save", str(saved_run))
    assert status == 1
    assert f"{saved_run} has a run already; dlkernels train --resume {saved_run} goes on with it" in error


def test_train_writes_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.run(["train", "lenet", "--epochs", "2", "--batch-size", "256", "--tensorboard", str(tmp_path)]) == 0
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "learning_rate",
        "train/loss",
        "validation/accuracy",
        "validation/loss",
    }
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 11))
    assert [event.step for event in events.Scalars("validation/loss")] == [5, 10]


def test_train_reads_a_folder_and_names_what_is_wrong_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    generator = numpy.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 10)):
        images = generator.integers(0, 256, (count, 8, 8), dtype=numpy.uint8)
        labels = numpy.arange(count, dtype=numpy.uint8) % 10
        header = struct.pack(">4I", 2051, count, 8, 8)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, count) + labels.tobytes())
    arguments = ["train", "lenet", "--data", str(tmp_path), "--epochs", "1", "--batch-size", "10"]
    assert cli.run(arguments) == 0
    assert "54 examples to train, 6 to validate, 10 to test" in capsys.readouterr().out
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    status, error = failing(capsys, *arguments)
    assert status == 1
    assert error == f"dlkernels: {path}, offset 17: label 10 of image 9 is not in 0 to 9\n"


def test_models_lists_every_network_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("│")[1].strip(): line for line in lines if line.startswith("│ ") and line[2] != " "}
    assert sorted(found) == models.list_models()
    assert [cell.strip() for cell in found["lenet"].split("│")[1:-1]] == [
        "lenet",
        "lenet",
        "a classifier",
        "",
        "212,590",
    ]
    assert cli.run(["models", "lenet"]) == 0
    listed = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert set(listed) == {"lenet"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["train, models, bench, convert-check or info"]),
        (["trian"], ["trian"]),
        (["train"], ["network", "lenet"]),
        (["train", "lenett"], ["'lenett'", "did you mean lenet", "list_models()"]),
        (["models", "nets"], ["nets", "lenet"]),
        (["train", "lenet", "--data", "mnist"], ["--data", "mnist", "digits", "synthetic", "MNIST"]),
        (["train", "lenet", "--data", "text"], ["--data", "lenet is a classifier", "digits", "synthetic", "text"]),
        (["train", "lenet", "--set", "depth=3"], ["--set", "depth=3", "image_size (int)", "num_classes (int)"]),
        (["train", "lenet", "--set", "num_classes"], ["--set", "NAME=VALUE", "got 'num_classes'"]),
        (["train", "lenet", "--set", "num_classes=many"], ["--set", "num_classes must be int, got 'many'"]),
        (["train", "lenet", "--set", "widths=3"], ["--set", "got 'widths=3'"]),
        (["train", "lenet", "--set", "num_classes=2", "--image-size", "9"], ["lenet: image_size must be", "got 9"]),
        (["train", "lenet", "--optimizer", "lion"], ["optimizer", "lion", "sgd", "adamw"]),
        (["train", "lenet", "--schedule", "zigzag"], ["schedule", "zigzag", "cosine", "plateau"]),
        (["train", "lenet", "--ema", "2"], ["ema", "(0, 1)", "2"]),
        (["train", "lenet", "--patience", "0"], ["--patience"]),
        (["train", "lenet", "--mixup", "0"], ["mixup must be a positive number, got 0.0"]),
        (["train", "lenet", "--cutout", "0"], ["--cutout"]),
        (["train", "lenet", "--scale-rate", "0"], ["--scale-rate"]),
        (["train", "lenet", "--tokens", "word"], ["--tokens", "lenet is a classifier"]),
        (["train", "lenet", "--device", "tpu"], ["--device", "cpu or cuda", "tpu"]),
        (["train", "lenet", "--epochs", "0"], ["--epochs"]),
        (["train", "lenet", "--epochs", "many"], ["--epochs"]),
        (["train", "lenet", "--batch-size", "1"], ["--batch-size"]),
        (["train", "lenet", "--learning-rate", "-1"], ["learning_rate", "-1"]),
        (["train", "lenet", "--learning-rate", "nan"], ["learning_rate", "nan"]),
        (["train", "lenet", "--learning-rate", "inf"], ["learning_rate", "inf"]),
        (["train", "lenet", "--threads", "0"], ["--threads"]),
        (["train", "lenet", "--seed", "-1"], ["--seed"]),
        (["train", "lenet", "--backend", "numpy"], ["backend", "dlkernels, torch", "numpy"]),
        (["train", "lenet", "--log-file"], ["--log-file"]),
        (["train", "lenet", "digits"], ["digits"]),
        (["bench", "pooling"], ["pooling", "attention"]),
        (["bench", "--dtype", "float8"], ["--dtype", "float8"]),
        (["bench", "--dtype", "bf16,int8"], ["--dtype", "'int8'", "bfloat16, float16, float32, float64"]),
        (["bench", "--providers", "torch,jax"], ["--providers", "'jax'", "dlkernels, torch, compile, thp"]),
        (["bench", "--mode", "sideways"], ["--mode", "'sideways'", "forward, backward, both"]),
        (["bench", "compare"], ["first"]),
        (["bench", "compare", "a.json"], ["second"]),
        (["bench", "compare", "a.json", "b.json", "--threshold", "-1"], ["--threshold", "0"]),
        (["bench", "--plot", "plot.txt"], ["--plot", "plot.txt", ".png"]),
        (["bench", "--threads", "0"], ["--threads"]),
        (["info", "--yaml"], ["--yaml"]),
        (["info", "extra"], ["extra"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, error = failing(capsys, *arguments)
    assert status == 2
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "lenet", "--batch-size", "5000"], ["batch size, 5000", "1294"]),
        (["train", "autoencoder", "--cutmix", "1"], ["cutmix=1.0 is for classifiers, this is an autoencoder"]),
        (["train", "lenet", "--data", "{tmp}/file"], ["/file: expected a folder of images"]),
        (["train", "lenet", "--data", "{tmp}/empty"], ["/empty: expected a folder of images for each class, found 0"]),
        (["train", "--resume", "{tmp}/empty"], ["/empty/last.safetensors: there is no such checkpoint"]),
        (["train", "lenet", "--save", "{tmp}/file"], ["/file: File exists"]),
        (["train", "lenet", "--learning-rate", "1e20"], ["the loss became", "step"]),
        (["train", "lenet", "--log-file", "{tmp}/missing/log.jsonl"], ["missing/log.jsonl", "No such file"]),
        (["train", "lenet", "--log-file", "{tmp}"], ["Is a directory"]),
        (["bench", "--quick", "--json", "{tmp}/file/x.json"], ["/file: File exists"]),
        (["bench", "conv2d", "--shapes", "nonet"], ["'nonet'", "LeNet conv1, 5x5; MobileNetV2", "conv2d 1x1, conti"]),
        (["bench", "conv2d", "--dtype", "fp64"], ["conv2d", "float64", "float32, bfloat16"]),
        (["bench", "compare", "{tmp}/missing.json", "{tmp}/file"], ["missing.json: No such file"]),
        (["bench", "compare", "{tmp}/file", "{tmp}/file"], ["/file holds no benchmark run: JSONDecodeError"]),
        (["bench", "compare", "{tmp}", "{tmp}/file"], ["Is a directory"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_failure_is_one_line_and_status_1(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    status, error = failing(capsys, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 1
    for word in words:
        assert word in error


@pytest.fixture
def little_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of one case with one sample."""
    from dlkernels.bench import harness, runner

    found = runner.find_cases
    monkeypatch.setattr(runner, "QUICK", harness.Budget(0.0, 1, 1, 0.0))
    monkeypatch.setattr(runner, "find_cases", lambda *arguments, gpu: list(found(*arguments, gpu=gpu))[:1])
    ceilings = harness.Ceilings(1e10, {"float32": 1e11})
    monkeypatch.setattr(runner, "measure_ceilings", lambda types, quick, device: ceilings)


@pytest.mark.usefixtures("little_to_measure")
def test_bench_writes_what_it_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new"
    files = {
        option: folder / name for option, name in (("--json", "a.json"), ("--plot", "b.png"), ("--report", "c.md"))
    }
    options = [text for option, path in files.items() for text in (option, str(path))]
    assert cli.run(["bench", "cross_entropy", "--quick", "--dtype", "float32", "--threads", "1", *options]) == 0
    out = capsys.readouterr().out
    assert "cross-entropy C 10-100, float32: CIFAR-10 (128x10): forward " in out
    assert "ceilings: copy 10.0 GB/s" in out
    assert all(path.stat().st_size > 0 for path in files.values())
    written = json.loads(files["--json"].read_text())
    assert [entry["direction"] for entry in written["results"]] == ["forward", "forward + backward"]
    assert written["environment"]["threads"] == 1
    assert json.loads((folder / "c.json").read_text()) == written


@pytest.mark.usefixtures("little_to_measure")
def test_bench_fails_on_a_wrong_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = dlkernels.functional.cross_entropy
    monkeypatch.setattr(dlkernels.functional, "cross_entropy", lambda input, target: 1.01 * real(input, target))
    status, error = failing(capsys, "bench", "cross_entropy", "--quick", "--dtype", "float32")
    assert status == 1
    assert "2 results differ from torch's: cross-entropy C 10-100: CIFAR-10 (128x10), float32, forward" in error


@pytest.mark.usefixtures("little_to_measure")
def test_bench_measures_the_shapes_and_directions_it_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    chosen = ["--shapes", "cifar10", "--dtype", "fp32", "--mode", "forward", "--providers", "dlkernels,torch"]
    assert cli.run(["bench", "cross_entropy", "--threads", "1", "--quick", *chosen, "--json", str(path)]) == 0
    assert "forward / both" not in capsys.readouterr().out
    (only,) = json.loads(path.read_text())["results"]
    assert (only["name"], only["dtype"], only["direction"]) == ("CIFAR-10 (128x10)", "float32", "forward")
    assert only["spread"] == {"dlkernels": 0.0, "torch": 0.0}  # of one sample


@pytest.mark.usefixtures("little_to_measure")
def test_bench_knows_short_names_and_backward_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = {kind: tmp_path / f"run.{kind}" for kind in ("json", "png", "md")}
    written = ["--json", paths["json"], "--plot", paths["png"], "--report", paths["md"]]
    chosen = ["--shapes", "cifar10", "--dtype", "fp32", "--mode", "fwd,bwd,full", *map(str, written)]
    assert cli.run(["bench", "cross_entropy", "--threads", "1", "--quick", *chosen]) == 0
    assert "forward / backward / both" in capsys.readouterr().out
    results = json.loads(paths["json"].read_text())["results"]
    assert [result["direction"] for result in results] == ["forward", "backward", "forward + backward"]
    assert "| backward: torch |" in paths["md"].read_text()
    assert paths["png"].stat().st_size > 1000


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, output and error of `bench compare`."""
    status = cli.run(["bench", "compare", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def measured_twice(tmp_path: Path) -> tuple[Path, Path]:
    """Files of two runs: on the second machine all takes half the time, and one case of ours is a tenth slower."""
    paths = tmp_path / "first.json", tmp_path / "second.json"
    for path, speed, slower in ((paths[0], 1.0, 1.0), (paths[1], 0.5, 1.1)):
        results = [
            bench.harness.Result(
                column="conv2d",
                group="a class",
                name=name,
                dtype="float32",
                direction="forward",
                bytes=1.0,
                operations=1.0,
                error=0.0,
                same=True,
                median={"dlkernels": 1e-3 * speed * factor, "torch": 2e-3 * speed},
                spread={"dlkernels": 0.03, "torch": 0.02},
                page_faults={"dlkernels": 0.0, "torch": 0.0},
                ratio={"torch": 2 / factor},
            )
            for name, factor in (("steady", 1.0), ("changing", slower), (f"only {path.stem}", 1.0))
        ]
        bench.write_json(bench.Run(info.environment(), bench.harness.Ceilings(1.0, {}), True, results), path)
    return paths


def test_bench_compare_judges_by_the_ratio_to_torch(
    capsys: pytest.CaptureFixture[str], measured_twice: tuple[Path, Path]
) -> None:
    first, second = measured_twice
    status, out, error = compared(capsys, first, second)
    assert status == 1
    assert error == (
        "dlkernels: 1 of 2 cases are more than 5 % slower against torch, the most a class, float32: changing, forward "
        "(+10.0%)\n"
    )
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in out.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows["a class, float32: steady, forward"]] == ["+0.0%", "-50.0%", "3%"]
    assert [cell.strip() for cell in rows["a class, float32: changing, forward"]] == ["+10.0%", "-45.0%", "3%"]
    for path in (first, second):
        assert f"only in {path}: a class, float32: only {path.stem}, forward" in out
        assert f"{path}: dlkernels {dlkernels.__version__}, PyTorch {torch.__version__}" in out


def test_bench_compare_passes_what_is_faster_or_within_the_threshold(
    capsys: pytest.CaptureFixture[str], measured_twice: tuple[Path, Path]
) -> None:
    first, second = measured_twice
    assert compared(capsys, second, first)[0] == 0
    assert compared(capsys, first, first)[0] == 0
    assert compared(capsys, first, second, "--threshold", "10.1")[0] == 0
    assert compared(capsys, first, second, "--threshold", "9.9")[0] == 1


def test_bench_compare_fails_on_results_that_became_wrong_and_on_nothing_in_common(
    capsys: pytest.CaptureFixture[str], measured_twice: tuple[Path, Path]
) -> None:
    first, second = measured_twice
    run = bench.read_json(first)
    for entry in run.results[1:]:
        entry.name += " of another run"
    run.results[0].same, run.results[0].ratio, run.results[0].median = False, {}, {}
    bench.write_json(run, second)
    status, _, error = compared(capsys, first, second)
    assert status == 1
    assert f"{second}: 1 results differ from torch's: a class, float32: steady, forward" in error
    run.results = run.results[1:]
    bench.write_json(run, second)
    status, _, error = compared(capsys, first, second)
    assert (status, error) == (1, f"dlkernels: {first} and {second} have no case in common\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dlkernels {dlkernels.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["models"], ["bench"], ["bench", "compare"], ["info"]],
    ids=lambda value: " ".join(value) or "all",
)
def test_help_goes_to_standard_output(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"Usage: {' '.join(['dlkernels', *command])} " in captured.out
    assert captured.err == ""


def test_runs_as_a_module() -> None:
    done = python("-m", "dlkernels", "--version")
    assert (done.returncode, done.stdout) == (0, f"dlkernels {dlkernels.__version__}\n")


def test_exit_status_reaches_the_shell() -> None:
    done = python("-m", "dlkernels", "train", "lenet", "--epochs", "-3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dlkernels: ")
    assert done.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m dlkernels info --json | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import dlkernels.cli"
    done = python("-c", program)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert "pip install 'dlkernels[cli]'" in done.stderr


def test_without_the_extra_the_benchmarks_say_what_to_install() -> None:
    done = python("-c", "import sys; sys.modules['rich'] = None; import dlkernels.bench")
    assert done.stderr.strip().endswith("dlkernels.bench needs rich; run: pip install 'dlkernels[cli]'")


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [
        ("sklearn", [], "cli"),
        ("safetensors", ["--save", "{tmp}/run"], "train"),
        ("safetensors", ["--resume", "{tmp}"], "train"),
        ("tensorboard", ["--tensorboard", "{tmp}/board"], "train"),
    ],
)
def test_without_an_optional_package_it_says_what_to_install(
    package: str,
    options: list[str],
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for module in [package, *(name for name in sys.modules if name.split(".")[0] == package)]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "last.safetensors").touch()
    network = [] if options[:1] == ["--resume"] else ["lenet"]
    status, error = failing(capsys, "train", *network, *(option.format(tmp=tmp_path) for option in options))
    assert status == 1
    assert package in error
    assert f"pip install 'dlkernels[{extra}]'" in error


def steps(count: int) -> list[Progress]:
    return [
        Progress(
            step=step,
            steps=count,
            epoch=1,
            epochs=1,
            losses={"loss": 1.0 / step},
            learning_rate=0.1,
            seconds=0.5 * step,
            examples=100 * step,
            validation={"accuracy": 0.75} if step == count else {},
        )
        for step in range(1, count + 1)
    ]


def test_a_terminal_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert show.is_live(console)
    assert len(list(show.shown(steps(4), console))) == 4
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in written
    assert "200 examples/s" in written
    assert "ETA" in written
    assert "validation accuracy 0.7500" in written


@pytest.mark.parametrize("variable", ["CI", "NO_COLOR"])
def test_plain_lines_on_request(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    assert not show.is_live(console)
    list(show.shown(steps(4), console))
    expected = "epoch   1/1  loss 0.2500  200 examples/s  validation accuracy 0.7500\n"
    assert console.file.getvalue() == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("plain", [False, True], ids=["colour", "NO_COLOR"])
def test_tables_have_colour_on_a_terminal_unless_told_otherwise(
    plain: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured_twice: tuple[Path, Path]
) -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-7]")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1" if plain else "")
    _, out, error = compared(capsys, *measured_twice)
    assert "\x1b[" not in error
    assert bool(colour.search(out)) is not plain
    for variable in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(variable)
    assert "\x1b[" not in compared(capsys, *measured_twice)[1]  # no terminal


@pytest.mark.parametrize("plain", [False, True], ids=["bar", "NO_COLOR"])
def test_the_bar_of_a_benchmark_is_drawn_on_a_terminal_only(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("NO_COLOR", "1" if plain else "")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert list(bench.runner.progressing([1, 2], console, str)) == [1, 2]
    assert bool(console.file.getvalue()) is not plain  # type: ignore[attr-defined]


def test_plain_lines_where_there_is_no_terminal() -> None:
    assert not show.is_live(Console(file=io.StringIO()))


SCRIPT = "import sys; sys.argv = ['/somewhere/bin/dlkernels', 'info']; from dlkernels.cli import main; main()"


@pytest.mark.parametrize("start", [("-m", "dlkernels", "info"), ("-c", SCRIPT)], ids=["module", "script"])
def test_an_error_of_the_import_is_one_line_of_the_command(start: tuple[str, ...]) -> None:
    done = python(*start, env={**os.environ, "DLKERNELS_ISA": "mmx"})
    assert done.returncode == 1
    assert done.stderr.startswith("dlkernels: DLKERNELS_ISA=mmx cannot be used here: expected one of baseline")
    assert done.stderr.count("\n") == 1


def test_an_error_of_the_import_is_an_import_error_in_a_program() -> None:
    done = python("-c", "import dlkernels", env={**os.environ, "DLKERNELS_ISA": "mmx"})
    assert "ImportError: DLKERNELS_ISA=mmx" in done.stderr


def test_bench_on_a_gpu_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert failing(capsys, "bench", "--device", "cuda") == (1, "dlkernels: --device cuda: torch finds no GPU here\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info, "build_facts", lambda: {"cuda": None})
    status, error = failing(capsys, "bench", "--device", "cuda")
    assert status == 1
    assert "this build has no CUDA kernels; run: DLKERNELS_CUDA=1 pip install ." in error
    status, error = failing(capsys, "bench", "--device", "cuda", "--providers", "thp")
    assert status == 2
    assert "huge pages are the processor's" in error
