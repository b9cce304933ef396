"""Whole networks on our layers against the same on torch's, eager and compiled: training steps and inference.

A training step is the forward pass, the loss, the backward pass and a step of torch's own SGD with momentum; bfloat16
is autocast over float32 weights. All contenders start from the same weights and see the same batch.

Before anything is timed, both libraries' results (the logits; the loss, and all gradients as one vector) are held
against torch's in float64, and ours may be at most twice as far away as torch's. Rounding grows from layer to layer,
more in some networks than in others, so that no fixed tolerance would fit them all. Where it moves an input of a ReLU
across zero the gradient jumps, in one library and not in the other: gradients are compared closely with a smooth
activation in each ReLU's place, and coarsely as they are.

Memory is what a fresh process needs for a network beyond the libraries, at its largest: weights, gradients, momenta,
activations, scratch, what the allocator keeps, and pages of code that run for the first time. It is taken as the kernel
counts it (resident pages), because neither library allocates everything through torch.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import info, models, nn
from ..writing import write_text
from .harness import (
    OURS,
    PROCESSOR,
    SAME,
    TORCH,
    Budget,
    Program,
    Times,
    dtype_name,
    geometric_mean,
    largest,
    stopwatch,
)
from .report import circumstances, markdown_table
from .runner import progressing

INFERENCE = "inference"
TRAINING = "training step"
COMPILED = "torch.compile"
LAYERS = {OURS: nn, TORCH: torch.nn}

ACROSS_KINKS = 0.1  # relative difference of gradients through ReLUs

QUICK = Budget(seconds=0.3, rounds=3)
FULL = Budget(seconds=4.0, rounds=7)


@dataclass(frozen=True)
class Workload:
    """A network of :mod:`dlkernels.models` and the batch that it is measured with."""

    title: str
    network: str
    batch: Callable[[], tuple[Tensor, ...]] = field(repr=False)  # inputs, and the targets last
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, layers: ModuleType) -> torch.nn.Module:
        """The network on ``layers``; the same weights every time."""
        torch.manual_seed(0)
        model = models.get_model(self.network, layers=layers, **self.arguments)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                # Norms that do nothing yet and last layers of zeros would hide differences.
                if tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all()):
                    tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.02 * torch.randn_like(tensor))
        return model

    @property
    def shape(self) -> str:
        """Of the input, examples first."""
        return "x".join(map(str, self.batch()[0].shape))


def images(count: int, channels: int, size: int, classes: int) -> Callable[[], tuple[Tensor, ...]]:
    """Normal pixels and random classes."""

    def batch() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(count, channels, size, size, generator=generator)
        return pixels, torch.randint(classes, (count,), generator=generator)

    return batch


def text(count: int, length: int, vocabulary: int) -> Callable[[], tuple[Tensor, ...]]:
    """Random tokens, and the same a place further."""

    def batch() -> tuple[Tensor, ...]:
        tokens = torch.randint(vocabulary, (count, length + 1), generator=torch.Generator().manual_seed(0))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


VIT_S = {"image_size": 224, "patch_size": 16, "num_layers": 12, "num_heads": 6, "hidden_dim": 384, "mlp_dim": 1536}
CHAR_LSTM = {"vocabulary_size": 65, "hidden_size": 256, "num_layers": 2}
# No dropout: each library draws its own.
WORKLOADS = {
    workload.network if name is None else name: workload
    for name, workload in (
        (None, Workload("LeNet", "lenet", images(64, 1, 28, 10))),
        (None, Workload("ResNet-18", "resnet18", images(8, 3, 224, 1000))),
        (None, Workload("ResNet-50", "resnet50", images(4, 3, 224, 1000))),
        (None, Workload("MobileNet v2", "mobilenet_v2", images(8, 3, 224, 1000), {"dropout": 0.0})),
        ("vit_s_16", Workload("ViT-S/16", "visiontransformer", images(8, 3, 224, 1000), VIT_S)),
        ("char_lstm", Workload("char-LSTM", "charlm", text(32, 64, 65), CHAR_LSTM)),
        (None, Workload("GPT-2 small", "gpt2_small", text(2, 256, 50_257), {"dropout": 0.0})),
    )
}


@dataclass(kw_only=True)
class NetworkResult(Times):
    """One network in one type, in training or in inference."""

    network: str
    title: str
    shape: str
    dtype: str
    direction: str
    examples: int  # images or sequences in a batch
    error: dict[str, float]  # relative difference from torch in float64, by contender
    same: bool
    peak_bytes: dict[str, int] = field(default_factory=dict)  # by contender


@dataclass
class NetworkRun:
    """Everything that one run found."""

    environment: dict[str, Any]
    quick: bool
    results: list[NetworkResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """What is further from float64 than torch is."""
        return [
            f"{r.title}, {r.dtype}, {r.direction} ({r.error[OURS]:.1e} from float64, torch {r.error[TORCH]:.1e})"
            for r in self.results
            if not r.same
        ]


# ---- What is measured ------------------------------------------------------------------------------------------------


def loss_function(model: torch.nn.Module, layers: ModuleType) -> Callable[..., Tensor]:
    """The loss of a batch: the network's own, or the cross-entropy of its logits."""
    if hasattr(model, "loss"):
        return model.loss  # type: ignore[return-value]
    criterion = layers.CrossEntropyLoss()
    return lambda images, labels: criterion(model(images), labels)


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Computes in ``dtype`` what can be, which is nothing for wider types."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def inference(model: torch.nn.Module, batch: tuple[Tensor, ...], dtype: torch.dtype, compiled: bool = False) -> Program:
    """Logits of a batch, without gradients; sets ``model`` to evaluation."""
    predict = torch.compile(model.eval()) if compiled else model.eval()

    def program() -> Tensor:
        with torch.no_grad(), autocast(dtype):
            output = predict(*batch[:-1])
        return output[0] if isinstance(output, tuple) else output  # a recurrent network's state is left out

    return program


def training_step(
    model: torch.nn.Module, layers: ModuleType, batch: tuple[Tensor, ...], dtype: torch.dtype, compiled: bool = False
) -> Program:
    """:func:`step_program` of a network of ours."""
    loss = loss_function(model.train(), layers)
    return step_program(torch.compile(loss) if compiled else loss, model, batch, dtype)


def step_program(
    loss: Callable[..., Tensor], model: torch.nn.Module, batch: tuple[Tensor, ...], dtype: torch.dtype
) -> Program:
    """One step on a batch; sets ``model`` to training. So small a rate leaves the numbers where they are."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)

    def program() -> Tensor:
        with autocast(dtype):
            value = loss(*batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value

    return program


def answers(
    direction: str, model: torch.nn.Module, layers: ModuleType, batch: tuple[Tensor, ...], dtype: torch.dtype
) -> list[list[Tensor]]:
    """The logits; or the loss, and the gradients."""
    if direction == INFERENCE:
        return [[inference(model, batch, dtype)()]]  # type: ignore[list-item]
    with autocast(dtype):
        value = loss_function(model.train(), layers)(*batch)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return [[value.detach()], list(gradients)]


def distance(answer: list[list[Tensor]], reference: list[list[Tensor]]) -> float:
    """The largest relative difference, each list taken as one vector."""

    def norm(tensors: Iterable[Tensor]) -> float:
        return math.sqrt(math.fsum(torch.linalg.vector_norm(tensor).item() ** 2 for tensor in tensors))

    return largest(
        norm(a.double() - b for a, b in zip(got, right, strict=True)) / max(norm(right), 1e-30)
        for got, right in zip(answer, reference, strict=True)
    )


def smoothed(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with every ReLU replaced by a SiLU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU | torch.nn.ReLU6):
                setattr(module, name, torch.nn.SiLU())
    return model


def errors(workload: Workload, direction: str, dtype: torch.dtype, smooth: bool) -> dict[str, float]:
    """How far both libraries are from torch in float64."""
    batch = workload.batch()
    wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in batch)

    def build(layers: ModuleType) -> torch.nn.Module:
        return smoothed(workload.build(layers)) if smooth else workload.build(layers)

    reference = answers(direction, build(torch.nn).double(), torch.nn, wide, torch.float64)
    return {
        name: distance(answers(direction, build(layers), layers, batch, dtype), reference)
        for name, layers in LAYERS.items()
    }


def agree(error: dict[str, float], tolerance: float) -> bool:
    """Whether ours is within ``tolerance``, or at most twice as far away as torch."""
    return error[OURS] <= max(tolerance, 2 * error[TORCH])


def programs(workload: Workload, direction: str, dtype: torch.dtype, compiled: bool) -> dict[str, Program]:
    """A program for each contender, with weights of its own."""
    batch = workload.batch()
    if compiled:
        torch.compiler.reset()
    contenders = [(OURS, nn, False), (TORCH, torch.nn, False), *([(COMPILED, torch.nn, True)] if compiled else [])]
    return {
        name: inference(workload.build(layers), batch, dtype, whether)
        if direction == INFERENCE
        else training_step(workload.build(layers), layers, batch, dtype, whether)
        for name, layers, whether in contenders
    }


# ---- Memory ----------------------------------------------------------------------------------------------------------


def resident_bytes(counter: str) -> int:
    """``VmRSS``, the memory that this process has now, or ``VmHWM``, the most since :func:`reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == counter:
            return 1024 * int(value.split()[0])
    raise ValueError(f"counter must be one of /proc/self/status, got {counter!r}")


def reset_peak() -> None:
    """Lets ``VmHWM`` begin again from what this process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(key: str, dtype: torch.dtype, contender: str, threads: int) -> dict[str, int]:
    """By direction, what a network needs at most, beyond what this process, a fresh one, has at first."""
    torch.set_num_threads(threads)
    workload, layers = WORKLOADS[key], LAYERS[contender]
    before = resident_bytes("VmRSS")
    batch, model = workload.batch(), workload.build(layers)
    found = {}
    for direction in (INFERENCE, TRAINING):
        reset_peak()
        if direction == INFERENCE:
            program = inference(model, batch, dtype)
        else:
            program = training_step(model, layers, batch, dtype)
        for _ in range(3):  # gradients and momenta are there from the second on
            program()
        found[direction] = resident_bytes("VmHWM") - before
    return found


def peak_bytes_elsewhere(key: str, dtype: torch.dtype, contender: str) -> dict[str, int]:
    """:func:`peak_bytes` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak_bytes, key, dtype, contender, torch.get_num_threads()).result()


# ---- A run -----------------------------------------------------------------------------------------------------------


def measure(key: str, dtype: torch.dtype, budget: Budget, compiled: bool) -> list[NetworkResult]:
    """One network in inference and in training; what is too far from float64 is not timed."""
    workload = WORKLOADS[key]
    results = []
    for direction in (INFERENCE, TRAINING):
        error = errors(workload, direction, dtype, smooth=direction == TRAINING)
        same = agree(error, SAME[dtype])
        if direction == TRAINING:
            same = same and agree(errors(workload, direction, dtype, smooth=False), ACROSS_KINKS)
        result = NetworkResult(
            network=key,
            title=workload.title,
            shape=workload.shape,
            dtype=dtype_name(dtype),
            direction=direction,
            examples=len(workload.batch()[0]),
            error=error,
            same=same,
        )
        results.append(result)
        if result.same:
            result.take(programs(workload, direction, dtype, compiled), budget, stopwatch(PROCESSOR))
    for contender in LAYERS:
        peak = peak_bytes_elsewhere(key, dtype, contender)
        for result in results:
            result.peak_bytes[contender] = peak[result.direction]
    return results


def describe(results: list[NetworkResult]) -> str:
    """One network's outcome in a line."""
    ratios = ", ".join(f"{r.direction} {r.ratio[TORCH]:.2f}x" if r.same else f"{r.direction} DIFFERS" for r in results)
    return f"{results[0].title}, {results[0].dtype}: {ratios}"


def run(
    keys: Sequence[str], dtypes: Sequence[str], *, quick: bool = False, console: Console | None = None
) -> NetworkRun:
    """Measures every network of ``keys`` in every type.

    Args:
        keys: some of :data:`WORKLOADS`.
        dtypes: ``"float32"`` and ``"bfloat16"``, or one of them.
        quick: fewer samples, and no compiled contender.
        console: where the progress goes; nowhere if not given.

    Raises:
        ValueError: there is no such network.
    """
    console = console or Console(quiet=True)
    start = time.perf_counter()
    found = NetworkRun(info.environment(), quick)
    cases = [(key, getattr(torch, name)) for key in keys for name in dtypes]
    for key, dtype in progressing(cases, console, lambda case: f"{WORKLOADS[case[0]].title}, {dtype_name(case[1])}"):
        results = measure(key, dtype, QUICK if quick else FULL, compiled=not quick)
        found.results += results
        console.print(describe(results), highlight=False, soft_wrap=True)
    found.seconds = time.perf_counter() - start
    return found


# ---- Report ----------------------------------------------------------------------------------------------------------

EXPLANATION = """\
Rates are images or sequences a second; a ratio is the peer's median time over ours, samples taken in turns in one
process, so that above 1 is faster than the peer. A training step is forward, loss, backward and a step of SGD with
momentum, which is torch's for all. bfloat16 is autocast over float32 weights; images are contiguous; dropout is off.
Memory is what a fresh process needs at most beyond the libraries. The error is the relative difference from torch in
float64: of the logits, or of the loss and the gradients with SiLU for ReLU, where rounding does not decide on zeros."""


def mean_ratios(results: Iterable[NetworkResult]) -> dict[tuple[str, str, str], float]:
    """The geometric mean over the networks by direction, type and peer."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for result in results:
        for peer, ratio in result.ratio.items():
            ratios.setdefault((result.direction, result.dtype, peer), []).append(ratio)
    return {key: geometric_mean(values) for key, values in ratios.items()}


def result_row(result: NetworkResult, peers: Sequence[str]) -> list[str]:
    """One line of a direction's table."""
    rates = [f"{result.examples / result.median[name]:,.1f}" if result.median else "" for name in (OURS, TORCH)]
    ratios = [f"{result.ratio[peer]:.2f}" if peer in result.ratio else "" for peer in peers]
    megabytes = [f"{result.peak_bytes[name] / 2**20:,.0f}" for name in (OURS, TORCH)]
    distances = [f"{result.error[name]:.1e}" for name in (OURS, TORCH)]
    return [f"{result.title} ({result.shape})", result.dtype, *rates, *ratios, *megabytes, *distances]


def report(run: NetworkRun) -> str:
    """The run in markdown: a table for training and one for inference."""
    lines = ["# Networks on dlkernels against the same on PyTorch", "", circumstances(run.environment), "", EXPLANATION]
    if run.wrong:
        lines += ["", "**Further from float64 than PyTorch, not timed:** " + "; ".join(run.wrong)]
    means = mean_ratios(run.results)
    for direction in (TRAINING, INFERENCE):
        results = [result for result in run.results if result.direction == direction]
        peers = list(dict.fromkeys(peer for result in results for peer in result.ratio))
        ratios_to = [f"ratio to {peer}" for peer in peers]
        headings = ["network", "type", "ours /s", "torch /s", *ratios_to, "ours MiB", "torch MiB"]
        rows = [result_row(result, peers) for result in results]
        for dtype in dict.fromkeys(result.dtype for result in results):
            ratios = [
                f"{means[direction, dtype, peer]:.2f}" if (direction, dtype, peer) in means else "" for peer in peers
            ]
            rows.append(["geometric mean", dtype, "", "", *ratios, "", "", "", ""])
        lines += ["", f"## {direction.capitalize()}", ""]
        lines += markdown_table([*headings, "error, ours", "error, torch"], rows)
    return "\n".join(lines) + "\n"


def write_report(run: NetworkRun, path: Path) -> None:
    """The report at ``path`` (markdown), with every figure in a JSON file of the same name beside it."""
    write_text(path, report(run))
    write_text(path.with_suffix(".json"), json.dumps(asdict(run), indent=1) + "\n")
