"""The benchmark harness: what it averages, the order in which it samples, what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from dlkernels import bench
from dlkernels.bench import batch_norm, report, runner
from dlkernels.bench.harness import (
    BACKWARD,
    BEST,
    BOTH,
    FORWARD,
    OURS,
    PROCESSOR,
    TORCH,
    Budget,
    Case,
    Ceilings,
    Cost,
    Problem,
    Result,
    geometric_mean,
    interleave,
    interquartile_range,
    measure,
    measure_ceilings,
    outputs_of,
    program,
    relative_difference,
    stopwatch,
)
from dlkernels.operations import OPERATIONS

CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 2e11})
SHORT = Budget(seconds=0.0, rounds=3, sample_seconds=1e-5)


def double(x: Tensor) -> Tensor:
    return 2 * x


def triple(x: Tensor) -> Tensor:
    return 3 * x


def case(ours=double, peer=double, name: str = "case") -> Case:
    def build(device: torch.device) -> Problem:
        return Problem((torch.arange(1.0, 9.0).requires_grad_(),), ours, peer)

    return Case("conv2d", "a class", name, torch.float32, build, Cost(64, 8), Cost(192, 24))


def result(name: str, direction: str, ratio: float, group: str = "a class") -> Result:
    return Result(
        column="conv2d",
        group=group,
        name=name,
        dtype="float32",
        direction=direction,
        bytes=1e6,
        operations=2e6,
        error=1e-7,
        same=True,
        median={OURS: 1e-3, TORCH: ratio * 1e-3},
        minimum={OURS: 0.9e-3, TORCH: ratio * 0.9e-3},
        spread={OURS: 0.04, TORCH: 0.06},
        page_faults={OURS: 0.0, TORCH: 12.0},
        ratio={TORCH: ratio},
        share_of_ceiling=0.5,
    )


def finished_run() -> bench.Run:
    ratios = {"small": (2.0, 4.0), "large": (8.0, 1.0)}
    results = [
        result(name, direction, ratio)
        for name, both in ratios.items()
        for direction, ratio in zip((FORWARD, BOTH), both, strict=True)
    ]
    return bench.Run(runner.info.environment(), CEILINGS, quick=True, results=results, seconds=1.0)


@pytest.mark.parametrize(("values", "mean"), [([2.0, 8.0], 4.0), ([7.0], 7.0), ([1e-300, 1e300], 1.0)])
def test_geometric_mean(values: list[float], mean: float) -> None:
    assert geometric_mean(values) == pytest.approx(mean)


@pytest.mark.parametrize("values", [[], [1.0, 0.0], [-1.0]])
def test_geometric_mean_refuses_what_has_none(values: list[float]) -> None:
    with pytest.raises(ValueError, match="a geometric mean needs positive values"):
        geometric_mean(values)


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    seconds, faults = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        Budget(0.0, 4, 4, 0.0),
        stopwatch(PROCESSOR),
    )
    assert calls == ["a", "a", "b", "b", *"ab" * 4]  # warm-up and estimate, then A B A B
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 4, "b": 4}
    assert {name: len(samples) for name, samples in faults.items()} == {"a": 4, "b": 4}


def test_seconds_are_per_call() -> None:
    samples: list[int] = []

    def elapsed(_: object, calls: int) -> float:
        samples.append(calls)
        return 0.25 * calls

    budget = Budget(seconds=-1.0, rounds=2, sample_seconds=1.0)
    seconds, _ = interleave({"a": lambda: None}, budget, elapsed, clock=lambda: 0.0)
    assert seconds == {"a": [0.25, 0.25]}
    assert samples == [1, 4, 4]  # an estimate, and samples as long as asked


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its events, in the order in which they are recorded; the time between them is not that of launching."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert stopwatch(torch.device("cuda"))(lambda: order.append("call"), 2) == 1.5
    assert order == ["record", "call", "call", "record", "wait"]


def test_rounds_go_on_until_the_time_is_spent() -> None:
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 1.0

    budget = Budget(seconds=6.5, rounds=2, most_rounds=50, sample_seconds=0.0)
    elapsed = stopwatch(PROCESSOR)
    assert len(interleave({"a": work}, budget, elapsed, clock=lambda: now)[0]["a"]) == 7
    assert len(interleave({"a": work}, Budget(1e9, 2, 5, 0.0), elapsed, clock=lambda: now)[0]["a"]) == 5


def test_page_faults_are_counted() -> None:
    def touch() -> None:
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)

    _, faults = interleave({"touch": touch, "nothing": lambda: None}, SHORT, stopwatch(PROCESSOR))
    assert sorted(faults["nothing"])[1] < 1
    assert sorted(faults["touch"])[1] >= 32  # even where a page is two megabytes


def test_both_directions_are_measured_after_they_agreed() -> None:
    forward, both = measure(case(), CEILINGS, SHORT)
    assert (forward.direction, both.direction) == (FORWARD, BOTH)
    for entry in (forward, both):
        assert entry.same
        assert entry.error == 0.0
        assert set(entry.median) == set(entry.minimum) == set(entry.spread) == set(entry.page_faults) == {OURS, TORCH}
        assert entry.ratio == {TORCH: entry.median[TORCH] / entry.median[OURS]}
        assert entry.minimum[OURS] <= entry.median[OURS]
    assert forward.share_of_ceiling == pytest.approx(64 / 1e10 / forward.median[OURS])


def test_only_the_directions_asked_for_are_measured() -> None:
    (only,) = measure(case(), CEILINGS, SHORT, directions=[BOTH])
    assert only.direction == BOTH


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_alone_is_what_forward_leaves_of_both(compiled: bool) -> None:
    measured = measure(case(), CEILINGS, SHORT, compiled, directions=[BOTH, BACKWARD])
    assert [entry.direction for entry in measured] == [BACKWARD, BOTH]
    assert all(entry.same for entry in measured)
    assert measured[0].bytes == case().both.bytes - case().forward.bytes
    assert measured[0].operations == case().both.operations - case().forward.operations
    x = torch.randn(3, 4, requires_grad=True)
    forwards = []

    def function(x: torch.Tensor) -> torch.Tensor:
        forwards.append(1)
        return x.square()

    backward = program(function, (x,), (torch.ones(3, 4),), BACKWARD)
    for _ in range(3):
        (gradient,) = backward()  # type: ignore[misc]
        assert torch.equal(gradient, 2 * x)
    assert len(forwards) == 1


@pytest.mark.parametrize(
    ("samples", "width"), [([3.0], 0.0), ([1.0, 2.0, 3.0, 4.0, 5.0], 2.0), ([1.0, 1.0, 1.0, 1.0, 99.0], 0.0)]
)
def test_the_spread_is_that_of_the_middle_half(samples: list[float], width: float) -> None:
    assert interquartile_range(samples) == width


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", {"ResNet-50 layer2 (4x128)", "LeNet"}),
        ("resnet50", {"ResNet-50 layer2 (4x128)"}),
        ("RESNET-50 Layer2", {"ResNet-50 layer2 (4x128)"}),
        ("a class", {"ResNet-50 layer2 (4x128)", "LeNet"}),
    ],
)
def test_shapes_are_found_by_part_of_their_name_or_class(text: str, names: set[str]) -> None:
    cases = [case(name="ResNet-50 layer2 (4x128)"), case(name="LeNet")]
    assert {found.name for found in runner.matching(cases, text)} == names


def test_an_unknown_shape_is_told_which_there_are() -> None:
    with pytest.raises(bench.BenchError, match="'vgg': there are LeNet; ResNet-50 layer2; the classes are a class"):
        runner.matching([case(name="ResNet-50 layer2 (4x128)"), case(name="LeNet")], "vgg")


def test_torchs_backends_compete_where_they_take_the_inputs() -> None:
    def unable(x: Tensor) -> Tensor:
        raise RuntimeError("no available kernel")

    backends = {"other": lambda x: x + x, "unable": unable}

    def build(device: torch.device) -> Problem:
        return Problem((torch.arange(1.0, 9.0, device=device).requires_grad_(),), double, double, backends)

    for entry in measure(replace(case(), build=build), CEILINGS, SHORT):
        assert set(entry.minimum) == {OURS, TORCH, "other"}
        assert set(entry.ratio) == {TORCH, "other", BEST}
        assert entry.ratio[BEST] == min(entry.ratio[TORCH], entry.ratio["other"])


def test_runs_of_columns_are_one_run(tmp_path: Path) -> None:
    first, second = finished_run(), finished_run()
    second.ceilings = Ceilings(2e10, {"float16": 3e11, "float32": 5e10})
    report.write_json(first, tmp_path / "first.json")
    read = report.read_json(tmp_path / "first.json")
    assert read == first
    both = report.merged([read, second])
    assert both.results == first.results + second.results
    assert both.ceilings == Ceilings(2e10, {"float32": 1e11, "bfloat16": 2e11, "float16": 3e11})
    assert both.seconds == 2.0
    (tmp_path / "other.json").write_text('{"results": [{}]}')
    with pytest.raises(ValueError, match="other.json holds no benchmark run: .* has no 'environment'"):
        report.read_json(tmp_path / "other.json")
    (tmp_path / "other.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="other.json holds no benchmark run: "):
        report.read_json(tmp_path / "other.json")


def test_a_gpu_is_named_in_the_report(tmp_path: Path) -> None:
    found = finished_run()
    facts = {"gpu": "A GPU", "multiprocessors": 132, "memory_bytes": 80 * 2**30, "cuda": "13.0", "cudnn": 91900}
    found.environment |= facts
    report.write_report(found, tmp_path / "gpu.md")
    assert "A GPU (132 multiprocessors, 80 GiB), CUDA 13.0, cuDNN 91900" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_result_is_not_timed() -> None:
    forward, both = measure(case(ours=triple), CEILINGS, SHORT)
    for entry in (forward, both):
        assert not entry.same
        assert entry.error == pytest.approx(0.5)
        assert not entry.median
        assert not entry.ratio


def test_a_wrong_gradient_is_not_timed() -> None:
    def right_forward_only(x: Tensor) -> Tensor:
        return 2 * x.detach() + (x - x.detach())

    forward, both = measure(case(ours=right_forward_only), CEILINGS, SHORT)
    assert forward.same
    assert not both.same


def test_no_output_of_batch_norm_with_relu_is_near_zero() -> None:
    """Where rounding would decide whether it has a gradient."""
    for entry in batch_norm.cases((torch.float32,), quick=True):
        if "ReLU" in entry.group:
            problem = entry.build(PROCESSOR)
            (output,) = outputs_of(problem.peer(*problem.inputs))
            assert output.eq(0).any() and output[output > 0].min() > 0.1


def test_nan_is_a_difference() -> None:
    (entry, *_) = measure(case(ours=lambda x: x * float("nan")), CEILINGS, SHORT)
    assert not entry.same


def test_nan_in_a_gradient_is_a_difference() -> None:
    def right_forward_only(x: Tensor) -> Tensor:
        output = 2 * x
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    forward, both = measure(case(ours=right_forward_only), CEILINGS, SHORT)
    assert forward.same
    assert not both.same


def test_relative_difference() -> None:
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0.0
    assert relative_difference(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])) == 1.0
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_the_ceiling_is_the_slower_of_memory_and_arithmetic() -> None:
    assert CEILINGS.seconds(Cost(1e10, 1e10), "float32") == pytest.approx(1.0)
    assert CEILINGS.seconds(Cost(1e9, 2e11), "float32") == pytest.approx(2.0)
    assert CEILINGS.seconds(Cost(1e9, 2e11), "bfloat16") == pytest.approx(1.0)


def test_ceilings_are_measured() -> None:
    found = measure_ceilings([torch.float32], quick=True)
    assert found.copy_bytes_per_second > 1e8
    assert found.arithmetic_rate["float32"] > 1e8


def test_classes_average_over_their_shapes() -> None:
    forward, both = report.classes(finished_run().results)
    assert (forward.shapes, both.shapes) == (2, 2)
    assert forward.ratio == {TORCH: pytest.approx(4.0)}
    assert both.ratio == {TORCH: pytest.approx(2.0)}
    assert (forward.worst, both.worst) == (2.0, 1.0)
    assert forward.page_faults == {OURS: 0.0, TORCH: 12.0}


def test_classes_leave_wrong_results_out() -> None:
    wrong = result("wrong", FORWARD, 9.0)
    wrong.same, wrong.ratio = False, {}
    (only,) = report.classes([result("right", FORWARD, 3.0), wrong])
    assert only.shapes == 1
    assert only.ratio == {TORCH: pytest.approx(3.0)}


def test_wrong_results_are_named() -> None:
    found = finished_run()
    assert found.wrong == []
    found.results[0].same, found.results[0].ratio, found.results[0].error = False, {}, 0.25
    assert found.wrong == ["a class: small, float32, forward (relative difference 2.5e-01)"]


def test_json_holds_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report.write_json(finished_run(), path)
    written = json.loads(path.read_text())
    assert set(written) == {"environment", "ceilings", "quick", "seconds", "classes", "results"}
    assert written["environment"]["torch"] == torch.__version__
    rates = {"float32": 1e11, "bfloat16": 2e11}
    assert written["ceilings"] == {"copy_bytes_per_second": 1e10, "arithmetic_rate": rates}
    assert len(written["results"]) == 4
    assert len(written["classes"]) == 2
    assert set(written["results"][0]) == {
        "column",
        "group",
        "name",
        "dtype",
        "direction",
        "bytes",
        "operations",
        "error",
        "same",
        "median",
        "minimum",
        "spread",
        "page_faults",
        "ratio",
        "share_of_ceiling",
    }


def test_report_has_classes_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "cpu.md"
    report.write_report(finished_run(), path)
    text = path.read_text()
    assert "| a class, float32 | 2 | 4.00 | 2.00 | 50% | 0 / 12 | 2.00 | 1.00 | 50% | 0 / 12 |" in text
    assert "| a class: large | float32 | forward | 1 | 8 | 8.00 | 8.00 | 4% / 6% | 1.0 | 2 | 50% |" in text
    assert "differ" not in text
    assert json.loads(path.with_suffix(".json").read_text())["quick"] is True
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_report_names_results_that_differ(tmp_path: Path) -> None:
    found = finished_run()
    found.results[0].same, found.results[0].ratio = False, {}
    report.write_report(found, tmp_path / "cpu.md")
    assert "not timed:** a class: small, float32, forward" in (tmp_path / "cpu.md").read_text()


@pytest.mark.parametrize("suffix", report.PLOT_FORMATS)
def test_plot_is_drawn(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot{suffix}"
    report.write_plot(finished_run(), path)
    assert path.stat().st_size > 4000


def test_huge_pages_are_merged_by_case(monkeypatch: pytest.MonkeyPatch) -> None:
    found = finished_run()
    seen = {}

    def run_elsewhere(command: list[str], env: dict[str, str], **_: object) -> None:
        seen["command"], seen["environment"] = command, env
        entry = result("small", FORWARD, 1.5).__dict__
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"results": [entry]}))

    monkeypatch.setattr(runner.subprocess, "run", run_elsewhere)
    runner.add_huge_pages(found, ["float32", "bfloat16"], ["forward"], "small")
    assert seen["environment"]["THP_MEM_ALLOC_ENABLE"] == "1"
    assert seen["command"][3:5] == ["bench", "conv2d"]
    chosen = ["--dtype", "float32,bfloat16", "--mode", "forward", "--shapes", "small"]
    assert seen["command"][-6:] == chosen
    assert [entry.ratio.get(bench.HUGE_PAGES) for entry in found.results] == [1.5, None, None, None]


def test_a_failed_run_with_huge_pages_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    done = runner.subprocess.CompletedProcess([], 3, stdout="", stderr="first\nlast line\n")
    monkeypatch.setattr(runner.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(bench.BenchError, match="the run with huge pages stopped with status 3: last line"):
        runner.add_huge_pages(finished_run(), ["float32"], ["forward"], "")


@pytest.mark.parametrize("gpu", [False, True], ids=["processor", "gpu"])
@pytest.mark.parametrize("column", OPERATIONS)
def test_every_class_has_cases(column: str, gpu: bool) -> None:
    both = (torch.float32, torch.bfloat16)
    full = list(runner.find_cases([column], both, quick=False, gpu=gpu))
    quick = list(runner.find_cases([column], both, quick=True, gpu=gpu))
    assert {(c.group, c.dtype) for c in quick} == {(c.group, c.dtype) for c in full}
    assert len(quick) == len({(c.group, c.dtype) for c in quick})
    assert len({(c.group, c.dtype, c.name) for c in full}) == len(full)
    assert all(c.column == column for c in full)
    assert all(0 < c.forward.bytes < c.both.bytes and 0 < c.forward.operations < c.both.operations for c in full)
    assert all(c.dtype == torch.float32 for c in runner.find_cases([column], both[:1], quick=False, gpu=gpu))


@pytest.mark.parametrize("column", OPERATIONS)
def test_every_quick_case_agrees_with_torch(column: str) -> None:
    for chosen in runner.find_cases([column], (torch.float32, torch.bfloat16), quick=True):
        problem = chosen.build(PROCESSOR)
        with torch.no_grad():
            shapes = outputs_of(problem.peer(*problem.inputs))
            ours = outputs_of(problem.ours(*problem.inputs))
        for a, b in zip(ours, shapes, strict=True):
            assert a.dtype == b.dtype == chosen.dtype
            assert relative_difference(a, b) < (1e-5 if chosen.dtype == torch.float32 else 2e-2), chosen


def load_script(path: Path) -> Any:
    """A program that no package holds, as a module."""
    location = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert location is not None and location.loader is not None
    script = importlib.util.module_from_spec(location)
    sys.modules[script.__name__] = script  # where its dataclasses look for their types
    location.loader.exec_module(script)
    return script


def test_readme_shows_the_committed_measurements() -> None:
    root = Path(__file__).resolve().parents[1]
    script = load_script(root / "benchmarks" / "harness.py")
    measured = json.loads((root / "benchmarks" / "results" / "cpu.json").read_text(encoding="utf-8"))
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert {entry["column"] for entry in measured["classes"]} == set(OPERATIONS)
    assert script.with_speed_table(readme, measured["classes"]) == readme
    assert script.with_speed_table(readme, measured["classes"][:1]) != readme


def test_a_gpu_measures_every_column_and_reports_after_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    gpu = load_script(root / "tools" / "gpu.py")
    assert set(gpu.COLUMNS) == set(OPERATIONS)
    real, dry = ([stage.name for stage in gpu.stages(dry_run)] for dry_run in (False, True))
    assert real == dry
    assert [name for name in real if name.startswith("bench")] == [f"bench {column}" for column in gpu.COLUMNS]

    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RECORDS", tmp_path / "build")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    for folder in (gpu.RECORDS, gpu.RESULTS):
        folder.mkdir()
    assert gpu.write_report(dry_run=False).endswith("nothing was measured")
    found = finished_run()
    found.environment |= {"gpu": "NVIDIA H200", "multiprocessors": 132, "memory_bytes": 2**37, "cuda": "", "cudnn": 0}
    report.write_json(found, gpu.RECORDS / "figures-lstm.json")
    assert gpu.write_report(dry_run=False).endswith("results/nvidia-h200.md: 1 of 7 columns")
    assert gpu.write_report(dry_run=True).endswith("nothing was measured")
    assert {path.name for path in gpu.RESULTS.iterdir()} == {f"nvidia-h200.{end}" for end in ("md", "json", "png")}
