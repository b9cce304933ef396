"""What only a GPU has: graphs captured and replayed, several streams, Python threads with a stream each.

That values and gradients are right there, the shared suites show: "cuda" is one of their instruction sets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

import dlkernels
from dlkernels import functional as F

from .cases import Case, Sample, all_cases, call, gradients, random_like, values_on
from .conftest import device_kernels

pytestmark = pytest.mark.skipif("cuda" not in device_kernels(), reason="no GPU, or a build without CUDA kernels")
WARM_UP = 3  # calls before one is captured
Result = TypeVar("Result")
# The lengths of packed sequences come from the processor with every call; a graph would keep those of its capture.
capturable = [case for case in all_cases() if "packed" not in case.name]


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    with values_on("cuda"):
        yield


def run(case: Case, sample: Sample) -> list[Tensor]:
    """Outputs and gradients, with incoming gradients that the processor has not drawn during the call."""
    outputs = call(case.function, sample)
    wanted = [o for o in outputs if o.requires_grad]
    grads = torch.autograd.grad(
        wanted,
        [sample.args[i] for i in sample.differentiable()],
        [torch.ones_like(o) for o in wanted],
        allow_unused=True,
        materialize_grads=True,
    )
    return [*(o.detach() for o in outputs), *grads]


def capture(function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of one call, and what that returned. The first calls load modules and ask for shared memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize("case", capturable, ids=str)
def test_a_captured_graph_computes_anew_from_what_its_inputs_hold(case: Case) -> None:
    sample = case.build(torch.float32).requiring_grad()
    graph, captured = capture(lambda: run(case, sample))

    other = case.build(torch.float32).requiring_grad()
    for i in sample.differentiable():
        changed = 1.25 * other.args[i].detach()
        other.args[i].detach().copy_(changed)
        sample.args[i].detach().copy_(changed)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(case, other), strict=True))


def test_a_captured_graph_draws_its_dropout_anew() -> None:
    query, key, value = (torch.randn(1, 2, 16, 8, device="cuda") for _ in range(3))
    graph, output = capture(lambda: F.scaled_dot_product_attention(query, key, value, dropout_p=0.5))
    graph.replay()
    first = output.clone()
    graph.replay()
    assert not torch.equal(output, first)


def test_a_converted_model_trains_in_a_captured_graph() -> None:
    """A whole step: forward, loss, backward and the optimiser, replayed, beside the same steps one call at a time."""

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(8 * 8 * 8, 5),
        )
        return dlkernels.convert(model.cuda())

    images, labels = torch.randn(4, 3, 8, 8, device="cuda"), torch.tensor([0, 1, 2, 3], device="cuda")

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    eager, captured = build(), build()
    eager_optimizer = torch.optim.SGD(eager.parameters(), 0.1, momentum=0.9)
    optimizer = torch.optim.SGD(captured.parameters(), 0.1, momentum=0.9)
    graph, loss = capture(lambda: step(captured, optimizer))
    losses = [step(eager, eager_optimizer) for _ in range(WARM_UP + 3)][WARM_UP:]
    for expected in losses:
        graph.replay()
        assert torch.equal(loss, expected)
    for ours, theirs in zip(captured.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_streams_do_not_disturb_each_other() -> None:
    """Two streams at once, on the same operations in opposite order; memory that one gives back the other may get."""
    cases = all_cases()
    expected = {str(case): run(case, case.build(torch.float32).requiring_grad()) for case in cases}
    samples = {str(case): case.build(torch.float32).requiring_grad() for case in cases}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results: list[tuple[str, list[Tensor]]] = []
    for pair in zip(cases, reversed(cases), strict=True):
        for case, stream in zip(pair, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append((str(case), run(case, samples[str(case)])))
    torch.cuda.synchronize()
    wrong = {
        name
        for name, found in results
        if not all(torch.equal(a, b) for a, b in zip(found, expected[name], strict=True))
    }
    assert not wrong


def test_python_threads_with_a_stream_each_do_not_disturb_each_other() -> None:
    cases = all_cases()
    expected = {str(case): run(case, case.build(torch.float32).requiring_grad()) for case in cases}
    samples = {str(case): case.build(torch.float32) for case in cases}
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(start: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(len(cases)):
                case = cases[(start + step) % len(cases)]
                found = run(case, samples[str(case)].requiring_grad())
                torch.cuda.current_stream().synchronize()
                if not all(torch.equal(a, b) for a, b in zip(found, expected[str(case)], strict=True)):
                    wrong.append(str(case))

    workers = [threading.Thread(target=work, args=(5 * i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_no_call_waits_for_the_device() -> None:
    """A call that read something back would stop a program that has work enough to queue."""
    samples = [(case, case.build(torch.float32).requiring_grad()) for case in capturable]
    grads = {
        str(case): random_like([o for o in call(case.function, sample) if o.requires_grad]) for case, sample in samples
    }
    torch.cuda.synchronize()
    with_sync_errors = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case, sample in samples:
            gradients(call(case.function, sample), sample, grads[str(case)])
    finally:
        torch.cuda.set_sync_debug_mode(with_sync_errors)
