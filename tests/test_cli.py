"""The command line: what it prints and writes, its exit status, and one line for every error."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("typer")

import dlkernels
from dlkernels import bench, cli, info, train
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
    assert [check["name"] for check in facts["self_test"]] == list(bench.COLUMNS)
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
    arguments = ["train", "lenet", "--data", "digits", "--epochs", "2", "--batch-size", "128", "--log", str(log)]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "epoch   1/2" in out
    assert "epoch   2/2" in out
    assert "test accuracy" in out
    for name in ("conv2d", "batch_norm", "cross_entropy", "everything else"):
        assert name in out
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 23))
    assert {record["steps"] for record in records} == {22}
    tested = [record["step"] for record in records if record["test_accuracy"] is not None]
    assert tested == [11, 22]
    assert records[-1]["loss"] < records[0]["loss"]


def test_train_counts_every_call_on_its_backend(capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("dlkernels", "torch"):
        assert cli.run(["train", "lenet", "--epochs", "1", "--batch-size", "256", "--backend", backend]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        here, _, total, *_ = last.split()
        assert last.endswith("calls of conv2d, batch_norm, linear, cross_entropy ran on dlkernels")
        assert int(total) >= 50
        assert int(here) == (int(total) if backend == "dlkernels" else 0)


def test_train_sets_the_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", "lenet", "--epochs", "1", "--batch-size", "700", "--threads", "2"]) == 0
    assert torch.get_num_threads() == 2
    assert "threads 2" in capsys.readouterr().out


def test_train_interrupted_says_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = train.train

    def interrupted(*arguments: object):  # type: ignore[no-untyped-def]
        for progress in real(*arguments):  # type: ignore[arg-type]
            yield progress
            if progress.step == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    status, error = failing(capsys, "train", "lenet")
    assert status == 1
    assert "interrupted at epoch 1, step 3 of 880, loss " in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["train, bench or info"]),
        (["trian"], ["trian"]),
        (["train"], ["network", "lenet"]),
        (["train", "resnet"], ["resnet", "lenet"]),
        (["train", "lenet", "--data", "mnist"], ["--data", "mnist", "digits"]),
        (["train", "lenet", "--epochs", "0"], ["--epochs"]),
        (["train", "lenet", "--epochs", "many"], ["--epochs"]),
        (["train", "lenet", "--batch-size", "1"], ["--batch-size"]),
        (["train", "lenet", "--learning-rate", "-1"], ["--learning-rate", "-1"]),
        (["train", "lenet", "--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (["train", "lenet", "--learning-rate", "inf"], ["--learning-rate", "inf"]),
        (["train", "lenet", "--threads", "0"], ["--threads"]),
        (["train", "lenet", "--seed", "-1"], ["--seed"]),
        (["train", "lenet", "--backend", "numpy"], ["--backend", "numpy"]),
        (["train", "lenet", "--log"], ["--log"]),
        (["train", "lenet", "digits"], ["digits"]),
        (["bench", "pooling"], ["pooling", "attention"]),
        (["bench", "--dtype", "float8"], ["--dtype", "float8"]),
        (["bench", "--peers", "jax"], ["--peers", "jax"]),
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
        (["train", "lenet", "--batch-size", "5000"], ["batch size, 5000", "1438"]),
        (["train", "lenet", "--learning-rate", "1e20"], ["the loss became", "step"]),
        (["train", "lenet", "--log", "{tmp}/missing/log.jsonl"], ["missing/log.jsonl", "No such file"]),
        (["train", "lenet", "--log", "{tmp}"], ["Is a directory"]),
        (["bench", "--quick", "--json", "{tmp}/file/x.json"], ["/file: File exists"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_failure_is_one_line_and_status_1(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
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


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"dlkernels {dlkernels.__version__}\n"


@pytest.mark.parametrize("command", [[], ["train"], ["bench"], ["info"]], ids=lambda value: " ".join(value) or "all")
def test_help_goes_to_standard_output(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "--help"]) == 0
    captured = capsys.readouterr()
    assert "Usage: dlkernels" in captured.out
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


def test_without_scikit_learn_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, error = failing(capsys, "train", "lenet")
    assert status == 1
    assert "sklearn" in error
    assert "pip install 'dlkernels[cli]'" in error


def steps(count: int) -> list[Progress]:
    return [
        Progress(
            step=step,
            steps=count,
            epoch=1,
            epochs=1,
            loss=1.0 / step,
            accuracy=0.5,
            learning_rate=0.1,
            seconds=0.5 * step,
            examples=100 * step,
            test_accuracy=0.75 if step == count else None,
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
    assert "200 images/s" in written
    assert "ETA" in written
    assert "test accuracy 0.7500" in written


@pytest.mark.parametrize("variable", ["CI", "NO_COLOR"])
def test_plain_lines_on_request(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    assert not show.is_live(console)
    list(show.shown(steps(4), console))
    expected = "epoch   1/1  loss 0.2500  accuracy 0.500  200 images/s  test accuracy 0.7500\n"
    assert console.file.getvalue() == expected  # type: ignore[attr-defined]


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
    status, error = failing(capsys, "bench", "--device", "cuda", "--peers", "thp")
    assert status == 2
    assert "huge pages are the processor's" in error
