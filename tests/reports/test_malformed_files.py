"""Malformed files: a checkpoint, log or benchmark that is damaged or made up is an error that names file and entry."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import bench, cli, typed_json
from dlkernels.train import checkpoint

from ..cases.bench_runs import measured_run

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("typer")
pytestmark = pytest.mark.usefixtures("small_networks")


Start = Callable[..., Path]


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, ...], Path]:
    """The folders of the runs that were made, by their options."""
    return {}


@pytest.fixture
def start(runs: dict[tuple[str, ...], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Gives the folder of a finished run with these options, a copy for each test."""

    def start(*options: str) -> Path:
        if options not in runs:
            runs[options] = tmp_path_factory.mktemp("run") / "run"
            network = ["tinyclassifier", "--data", "synthetic", "--image-size", "4", "--batch-size", "300"]
            kept = ["--epochs", "2", "--patience", "1", "--ema", "0.9", "--save", str(runs[options])]
            assert cli.run(["train", *network, *kept, *options]) == 0
        return shutil.copytree(runs[options], tmp_path / "run")

    return start


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Writes a checkpoint again with other content, and the checksums of that."""
    tensors, facts = checkpoint.read(path)
    change(tensors, facts)
    checkpoint.write(path, tensors, facts)


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert cli.run(list(command)) == 1
    error = capsys.readouterr().err
    assert error.startswith("dlkernels: ")
    assert error.count("\n") == 1
    return error.removeprefix("dlkernels: ").rstrip("\n")


def put(facts: Any, keys: str, value: Any) -> None:
    """Sets an entry; dots separate the keys to it."""
    *path, last = keys.split(".")
    for key in path:
        facts = facts[key]
    facts[last] = value


# Checkpoints


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"])
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype", "nan", "scalar", "renamed", "too much", "steps"])
def test_what_the_optimiser_remembers_must_fit(
    optimizer: str, damage: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    path = start("--optimizer", optimizer, "--learning-rate", "0.01") / checkpoint.LAST
    names = [name for name in checkpoint.read(path)[0] if name.startswith("optimizer.loss.0.")]
    name = max((name for name in names if not name.endswith(".step")), default="")
    counter = "optimizer.loss.0.step"
    words = {
        "missing": f"'{name}' is missing",
        "shape": f"'{name}' has shape [3, 3], this run needs [16, 48]",
        "dtype": f"'{name}' has dtype torch.float64, this run needs torch.float32",
        "nan": f"'{name}' has elements that are not a number",
        "scalar": f"'{name}' has shape []",
        "renamed": f"'{name}.x.y' is nothing that this run has",
        "too much": "'optimizer.loss.zzz' is nothing that this run has",
        "steps": f"'{counter}' must be in 1 to ",
    }
    if (not names and damage != "too much") or (damage == "steps" and counter not in names):
        return  # it remembers nothing of this kind

    def change(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if damage == "missing":
            for entry in names if len(names) > 1 else [name for name in tensors if name.startswith("optimizer.")]:
                if entry == name or len(names) == 1:
                    del tensors[entry]
        elif damage == "renamed":
            tensors[f"{name}.x.y"] = tensors[name]
        elif damage == "too much":
            tensors["optimizer.loss.zzz"] = torch.zeros(1)
        elif damage == "steps":
            tensors[counter] = torch.tensor(0.0)
        else:
            make = {
                "shape": lambda old: torch.zeros(3, 3),
                "dtype": lambda old: old.double(),
                "nan": lambda old: torch.full_like(old, math.nan),
                "scalar": lambda old: torch.tensor(1.0),
            }
            tensors[name] = make[damage](tensors[name])

    rewrite(path, change)
    error = refused(capsys, "train", "--resume", str(path.parent))
    assert error.startswith(f"{path}: ")
    assert words[damage] in error


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        (checkpoint.LAST, "model.hidden.weight", "'model.hidden.weight' has "),
        (checkpoint.LAST, "average.module.hidden.weight", "'average.module.hidden.weight' has "),
        (checkpoint.BEST, "hidden.weight", "'weights.hidden.weight' has "),
    ],
)
@pytest.mark.parametrize("damage", ["dtype", "nan"])
def test_weights_must_fit(
    file: str, name: str, words: str, damage: str, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    path = start() / file
    change = {"dtype": Tensor.double, "nan": lambda old: torch.full_like(old, math.nan)}[damage]
    rewrite(path, lambda tensors, facts: tensors.update({name: change(tensors[name])}))
    assert refused(capsys, "train", "--resume", str(path.parent)).startswith(f"{path}: {words}")


def test_best_weights_must_be_all_there(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = start() / checkpoint.BEST
    rewrite(path, lambda tensors, facts: tensors.__delitem__("hidden.weight"))
    assert refused(capsys, "train", "--resume", str(path.parent)) == f"{path}: 'weights.hidden.weight' is missing"


def test_an_element_that_changed_on_the_disk_is_found(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = start() / checkpoint.LAST
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    error = refused(capsys, "train", "--resume", str(path.parent))
    assert error.startswith(f"{path}: '")
    assert error.endswith("' is damaged: it has another checksum than when it was written")


def test_a_fact_that_changed_on_the_disk_is_found(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = start() / checkpoint.LAST
    content = path.read_bytes()
    assert content.count(b'\\"batch_size\\": 300') == 1
    path.write_bytes(content.replace(b'\\"batch_size\\": 300', b'\\"batch_size\\": 200'))
    error = refused(capsys, "train", "--resume", str(path.parent))
    assert error.startswith(f"{path}: this is no checkpoint, or a damaged one: the facts in its header have another")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("run", 1),
        ("run.device", "meta"),
        ("run.threads", 0),
        ("run.threads", 10**9),
        ("run.save_every", 0),
        ("run.log_file", ["x"]),
        ("run.recipe.network", None),
        ("run.recipe.network", "nonet"),
        ("run.recipe.image_size", -1),
        ("run.recipe.image_size", 10**30),
        ("run.recipe.image_size", 10**9),
        ("run.recipe.length", "x"),
        ("run.recipe.arguments", []),
        ("run.recipe.arguments", {"hidden_features": [1]}),
        ("run.recipe.arguments", {"hidden_features": 2**50}),
        ("run.recipe.arguments", {"layers": "os"}),
        ("run.recipe.settings.epochs", 1.5),
        ("run.recipe.settings.epochs", True),
        ("run.recipe.settings.momentum", math.nan),
        ("run.recipe.settings.seed", 10**30),
        ("run.recipe.settings.unknown", 1),
        ("state", None),
        ("state.step", -1),
        ("state.step", 10**6),
        ("state.step", "12"),
        ("state.seconds", math.inf),
        ("state.best_step", 10**6),
        ("state.best_loss", "small"),
        ("state.schedule", {}),
        ("state.schedule.waited", math.inf),
        ("state.schedule.reduction", -1.0),
        ("state.generators", "x"),
        ("state.generators", ["[" * 10_000]),
        ("state.data", 1.5),
        ("tensors", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_facts_must_be_those_of_a_run(entry: str, value: Any, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = start() / checkpoint.LAST
    tensors, facts = checkpoint.read(path)
    put(facts, entry, value)
    safetensors_torch.save_file(tensors, path, {checkpoint.KEY: json.dumps(facts)})
    error = refused(capsys, "train", "--resume", str(path.parent))
    assert error.startswith(f"{path}: ")
    # A size that no memory is enough for is the network's or the data's to refuse.
    assert any(name in error for name in (entry.rpartition(".")[2], "tinyclassifier: ", "synthetic: "))


@pytest.mark.parametrize("entry", ["run.device", "run.recipe.settings.ema", "state.best_loss", "state"])
def test_facts_must_be_there(entry: str, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    path = start() / checkpoint.LAST
    *keys, last = entry.split(".")

    def change(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for key in keys:
            facts = facts[key]
        del facts[last]

    rewrite(path, change)
    error = refused(capsys, "train", "--resume", str(path.parent))
    assert error.startswith(f"{path}: ")
    assert last in error


@pytest.mark.parametrize(
    ("generator", "state"),
    [
        ("python", [3, [1] * 624, None]),
        ("python", [3, [2**40] * 625, None]),
        ("numpy", ["MT19937", [1] * 624, 9999, 0, 0.0]),  # numpy itself reads memory that is not its own
        ("numpy", ["MT19937", [1] * 624, -5, 0, 0.0]),
        ("numpy", ["MT19937", [2**40] * 624, 5, 0, 0.0]),
        ("numpy", ["PCG64", [1] * 624, 5, 0, 0.0]),
        ("torch", "AAAA"),
        ("torch", 3),
    ],
    ids=lambda value: str(value)[:20],
)
def test_generators_stand_where_they_can(
    generator: str, state: Any, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    path = start() / checkpoint.LAST

    def change(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        facts["state"]["generators"] = [
            json.dumps({**json.loads(text), generator: state}) for text in facts["state"]["generators"]
        ]

    rewrite(path, change)
    error = refused(capsys, "train", "--resume", str(path.parent))
    assert error.startswith(f"{path}: the state of {generator}'s generator cannot be used: ")


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "null", "NaN", '"a"', "[1]", "{}"], ids=lambda text: text[:5])
def test_a_header_must_be_that_of_a_run(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / checkpoint.LAST
    safetensors_torch.save_file({"a": torch.ones(1)}, path, {checkpoint.KEY: text})
    assert refused(capsys, "train", "--resume", str(tmp_path)).startswith(f"{path}: ")


def test_checksums_know_type_and_shape() -> None:
    zeros = torch.zeros(2, 3)
    others = [zeros.int(), zeros.view(3, 2), zeros[:1].expand(2, 3).contiguous().bfloat16(), torch.zeros(())]
    assert len({checkpoint.checksum(tensor) for tensor in (zeros, *others)}) == 5
    assert checkpoint.checksum(torch.empty(0, 3)) == zlib.crc32(b"torch.float32 [0, 3]")


# Logs


@pytest.mark.parametrize(
    "line", ["x", "[]", '{"step": "1"}', '{"step": null}', "[" * 100_000, "\x00\x00"], ids=lambda line: ascii(line[:9])
)
def test_a_log_that_is_none_is_named(
    line: str, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, log = start(), tmp_path / "log"
    log.write_text(f'{{"step": 1}}\n{line}\n')
    error = refused(capsys, "train", "--resume", str(folder), "--log-file", str(log))
    assert error.startswith(f"{log}, line 2: this is no record of a step: ")
    assert log.read_text() == f'{{"step": 1}}\n{line}\n'


# Benchmarks


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """The file of a run."""
    bench.write_json(measured_run(), tmp_path / "a")
    return tmp_path / "a"


BAD = [None, 0, -1, "x", [], {}, True, 10**30, math.nan, "\x1b[2J"]


@pytest.mark.parametrize(
    "keys",
    [
        ("environment",),
        ("ceilings",),
        ("ceilings", "arithmetic_rate"),
        ("results",),
        ("results", 0),
        ("results", 0, "name"),
        ("results", 0, "same"),
        ("results", 0, "median"),
        ("results", 0, "median", "dlkernels"),
        ("results", 0, "ratio"),
        ("results", 0, "ratio", "torch"),
        ("results", 0, "spread", "dlkernels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [*BAD, "deleted"], ids=ascii)
def test_a_damaged_benchmark_is_compared_or_named(
    keys: tuple[Any, ...], value: Any, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = measured.with_name("b")
    whole = facts = json.loads(measured.read_text())
    for key in keys[:-1]:
        facts = facts[key]
    before = facts[keys[-1]]
    if value == "deleted":
        del facts[keys[-1]]
    else:
        facts[keys[-1]] = value
    damaged.write_text(json.dumps(whole))
    for order in ((measured, damaged), (damaged, measured)):
        capsys.readouterr()
        status, error = cli.run(["bench", "compare", *map(str, order)]), capsys.readouterr().err
        assert status in (0, 1) and error.count("\n") <= 1
        if type(value) is not type(before) and value != "deleted":
            assert error.startswith(f"dlkernels: {damaged} holds no benchmark run: ") or isinstance(before, float)
    assert status == 1 or keys[-1] != "median"


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 200_000, b'{"results": 3}'],
    ids=lambda content: ascii(content[:9]),
)
def test_what_is_no_benchmark_is_named(content: bytes, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured.with_name("b").write_bytes(content)
    error = refused(capsys, "bench", "compare", str(measured), str(measured.with_name("b")))
    assert error.startswith(f"{measured.with_name('b')} holds no benchmark run: ")


def test_names_of_cases_are_no_markup(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured.write_text(measured.read_text().replace("a shape", "[/red] a shape"))
    assert cli.run(["bench", "compare", str(measured), str(measured)]) == 0
    assert "[/red] a shape" in capsys.readouterr().out


# Values from JSON


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "x must be an integer of 64 bits, got true"),
        (2**63, int, "x must be an integer of 64 bits, got 9223372036854775808"),
        (10**400, float, "x must be a number, got 1000000"),
        ("a\x1b", str, r"x must be a printable text, got 'a\x1b'"),
        ({"a": [1, "b"]}, dict[str, list[int]], "x.a[1] must be an integer of 64 bits, got 'b'"),
        ("1", float | None, "x must be a number, got '1'"),
        ("a" * 100, int, f"x must be an integer of 64 bits, got '{'a' * 39}..."),
    ],
    ids=str,
)
def test_values_are_checked_against_types(value: Any, hint: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        typed_json.checked(value, hint, "x")
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [(1, float, 1.0), (None, int | None, None), ({"a": 1}, dict[str, Any], {"a": 1}), (3, bool | int | str, 3)],
)
def test_values_of_their_types_pass(value: Any, hint: Any, expected: Any) -> None:
    found = typed_json.checked(value, hint, "x")
    assert (found, type(found)) == (expected, type(expected))
