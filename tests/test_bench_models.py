"""Networks measured whole: what is held against float64, what is timed, what memory is counted, what is written."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from dlkernels import info, nn
from dlkernels.bench import models
from dlkernels.bench.harness import OURS, TORCH, Budget
from dlkernels.models import get_model, list_models

ROOT = Path(__file__).resolve().parents[1]
SHORT = Budget(seconds=0.0, rounds=2, sample_seconds=1e-5)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each figure of memory takes seconds."""
    peak = {models.INFERENCE: 2**20, models.TRAINING: 2**21}
    monkeypatch.setattr(models, "peak_bytes_elsewhere", lambda key, dtype, contender: peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_is_measured_in_inference_and_in_training(no_processes: None, dtype: torch.dtype) -> None:
    inference, training = models.measure("lenet", dtype, SHORT, compiled=False)
    assert (inference.direction, training.direction) == (models.INFERENCE, models.TRAINING)
    for result in (inference, training):
        assert result.same
        assert 0 < result.error[OURS] < (1e-5 if dtype == torch.float32 else 0.2)
        assert set(result.median) == {OURS, TORCH}
        assert result.ratio == {TORCH: result.median[TORCH] / result.median[OURS]}
        assert result.examples == 64
    assert training.peak_bytes == {OURS: 2**21, TORCH: 2**21}


class SlightlyWrong(nn.Linear):
    """One part in a thousand too much."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 1.001 * super().forward(input)


def test_a_network_that_is_further_from_float64_than_torchs_is_not_timed(
    no_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = types.SimpleNamespace(**{**vars(nn), "Linear": SlightlyWrong})
    monkeypatch.setitem(models.LAYERS, OURS, wrong)
    results = models.measure("lenet", torch.float32, SHORT, compiled=False)
    for result in results:
        assert not result.same
        assert 1e-4 < result.error[OURS] < 1e-1
        assert not result.median
        assert not result.ratio
    run = models.NetworkRun(info.environment(), True, results)
    assert [text.partition(" (")[0] for text in run.wrong] == [
        "LeNet, float32, inference",
        "LeNet, float32, training step",
    ]
    assert "not timed:** LeNet, float32, inference" in models.report(run)


def test_distance_takes_the_gradients_as_one_vector() -> None:
    reference = [[torch.tensor(2.0)], [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]]
    assert models.distance(reference, reference) == 0.0
    off = [[torch.tensor(2.0)], [torch.tensor([3.0, 0.5]), torch.tensor([4.0])]]
    assert models.distance(off, reference) == pytest.approx(0.1)
    assert models.distance([[torch.tensor(3.0)], reference[1]], reference) == pytest.approx(0.5)
    assert math.isnan(models.distance([reference[0], [reference[1][0], torch.tensor([math.nan])]], reference))


@pytest.mark.parametrize("key", ["lenet", "vit_s_16"])
def test_nothing_of_a_network_is_left_constant_lest_all_results_agree(key: str) -> None:
    first, second = (models.WORKLOADS[key].build(layers).state_dict() for layers in (nn, torch.nn))
    assert all(len(tensor.unique()) > 1 for tensor in first.values() if tensor.numel() > 1)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_smooth_activations_take_the_place_of_every_relu() -> None:
    model = models.smoothed(get_model("lenet"))
    assert sum(isinstance(module, torch.nn.SiLU) for module in model.modules()) == 4
    assert not any(isinstance(module, torch.nn.ReLU) for module in model.modules())


@pytest.mark.parametrize(
    ("ours", "torchs", "same"), [(1e-5, 0.0, True), (1e-3, 6e-4, True), (1e-3, 4e-4, False), (math.nan, 1.0, False)]
)
def test_results_agree_within_a_tolerance_or_twice_torchs_error(ours: float, torchs: float, same: bool) -> None:
    assert models.agree({OURS: ours, TORCH: torchs}, 1e-4) is same


def test_training_steps_move_the_weights_and_hardly_so() -> None:
    workload = models.WORKLOADS["lenet"]
    model = workload.build(nn)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = models.training_step(model, nn, workload.batch(), torch.float32)
    for _ in range(3):
        step()
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), before, strict=True)]
    assert 0 < max(moved) < 1e-4


@pytest.mark.parametrize("key", [key for key, work in models.WORKLOADS.items() if work.network in list_models()])
def test_workloads_fit_their_networks(key: str) -> None:
    workload = models.WORKLOADS[key]
    with torch.device("meta"):
        model = get_model(workload.network, layers=torch.nn, **workload.arguments)
    batch = tuple(tensor.to("meta") for tensor in workload.batch())
    assert models.loss_function(model, torch.nn)(*batch).shape == ()


def test_the_peak_counts_weights_gradients_and_momenta() -> None:
    found = models.peak_bytes_elsewhere("lenet", torch.float32, OURS)
    weights = 4 * sum(parameter.numel() for parameter in models.WORKLOADS["lenet"].build(nn).parameters())
    assert weights < found[models.INFERENCE] < 2**30
    assert 3 * weights < found[models.TRAINING] < 2**30


def test_the_peak_is_of_resident_pages() -> None:
    """In a process of its own: what other tests have freed may come or go at any time."""
    program = (
        "import torch; from dlkernels.bench import models; models.reset_peak(); "
        "peaks = [models.resident_bytes('VmHWM')]; torch.ones(64 * 2**20, dtype=torch.uint8); "
        "peaks.append(models.resident_bytes('VmHWM')); models.reset_peak(); "
        "peaks.append(models.resident_bytes('VmHWM')); print(*peaks)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    before, peak, after = map(int, done.stdout.split())
    assert peak - before >= 60 * 2**20
    assert after - before < 30 * 2**20
    with pytest.raises(ValueError, match="counter must be one of /proc/self/status, got 'VmNothing'"):
        models.resident_bytes("VmNothing")


def result(network: str, direction: str, ratios: dict[str, float], dtype: str = "float32") -> models.NetworkResult:
    seconds = {OURS: 0.5, **{peer: 0.5 * ratio for peer, ratio in ratios.items()}}
    return models.NetworkResult(
        network=network,
        title=models.WORKLOADS[network].title,
        shape="4x3x8x8",
        dtype=dtype,
        direction=direction,
        examples=4,
        error={OURS: 1e-7, TORCH: 2e-7},
        same=True,
        median=seconds,
        minimum=seconds,
        page_faults=dict.fromkeys(seconds, 0.0),
        ratio=ratios,
        peak_bytes={OURS: 3 * 2**20, TORCH: 5 * 2**20},
    )


def finished_run() -> models.NetworkRun:
    results = [
        result("lenet", models.TRAINING, {TORCH: 2.0, models.COMPILED: 1.0}),
        result("resnet18", models.TRAINING, {TORCH: 8.0, models.COMPILED: 4.0}),
        result("lenet", models.INFERENCE, {TORCH: 3.0}),
    ]
    return models.NetworkRun(info.environment(), False, results, 1.0)


def test_the_report_has_a_table_for_each_direction(tmp_path: Path) -> None:
    path = tmp_path / "models-cpu.md"
    models.write_report(finished_run(), path)
    text = path.read_text()
    assert "| LeNet (4x3x8x8) | float32 | 8.0 | 4.0 | 2.00 | 1.00 | 3 | 5 | 1.0e-07 | 2.0e-07 |" in text
    assert "| geometric mean | float32 |  |  | 4.00 | 2.00 |  |  |  |  |" in text
    assert "| LeNet (4x3x8x8) | float32 | 8.0 | 2.7 | 3.00 | 3 | 5 | 1.0e-07 | 2.0e-07 |" in text
    assert text.index("## Training step") < text.index("## Inference")
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1
    written = json.loads(path.with_suffix(".json").read_text())
    assert set(written) == {"environment", "quick", "results", "seconds"}
    assert written["results"][0]["ratio"] == {TORCH: 2.0, models.COMPILED: 1.0}


@pytest.fixture
def script() -> Any:
    location = importlib.util.spec_from_file_location(
        "bench_models", Path(__file__).resolve().parents[1] / "benchmarks" / "bench_models.py"
    )
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def test_a_part_is_shown_and_everything_is_written(
    script: Any,
    no_processes: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(models, "QUICK", SHORT)
    assert script.main(["--quick", "--model", "lenet", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.count("| LeNet (64x1x28x28) | float32 |") == 2
    assert not list(tmp_path.iterdir())

    asked: dict[str, Any] = {}

    def everything(keys: list[str], dtypes: tuple[str, ...], **options: Any) -> models.NetworkRun:
        asked.update(keys=keys, dtypes=dtypes, **options)
        return finished_run()

    monkeypatch.setattr(script.models, "run", everything)
    assert script.main([]) == 0
    assert asked["keys"] == list(models.WORKLOADS)
    assert asked["dtypes"] == ("float32", "bfloat16")
    assert asked["quick"] is False
    kind = "models-cpu-amx" if info.environment()["isa"] == "amx" else "models-cpu"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}.json", f"{kind}.md"]


def test_an_unknown_network_is_named(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--model", "lenet6"])
    assert "invalid choice: 'lenet6'" in capsys.readouterr().err
