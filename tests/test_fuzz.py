"""The fuzzer finds what it is there to find: each check is given a function that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels.operations import OPERATIONS

from .fuzz import checks
from .fuzz.draw import Draw
from .fuzz.layouts import LAYOUTS, GuardedMemory, in_layout

SEEDS = range(20)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the fuzzer runs: its tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def linear(change: Callable[[Callable[..., Any], tuple[Tensor, ...]], Any]) -> Callable[[Draw], Any]:
    """Draws calls of linear whose function is changed."""
    original = checks.CALLS["linear"]

    def drawn(draw: Draw) -> Any:
        call = original(draw)
        return replace(call, ours=lambda *tensors: change(call.ours, tensors))

    return drawn


def modify_input(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
    result = function(*tensors)
    with torch.no_grad():
        tensors[0].view(-1)[:1].add_(1)
    return result


def refuse(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
    raise RuntimeError("refused")


FAULTS: dict[str, Callable[..., Any]] = {
    "accuracy": lambda function, tensors: function(*tensors) * (1 + 1e-4),
    "not finite": lambda function, tensors: function(*tensors).masked_fill(torch.tensor(True), torch.nan),
    "shape": lambda function, tensors: function(*tensors)[None],
    "type": lambda function, tensors: function(*tensors).double(),
    "requires_grad": lambda function, tensors: function(*tensors).detach(),
    "input modified": modify_input,
    "raises": refuse,
    "bits": lambda function, tensors: function(*tensors) + (0 if tensors[0].is_contiguous() else 1e-7),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.CALLS, "linear", linear(FAULTS[kind]))
    found = {finding.kind for seed in SEEDS for finding in checks.check("linear", seed).findings}
    assert kind in found


def test_every_operation_is_called() -> None:
    assert set(OPERATIONS) <= set(checks.CALLS)


@pytest.mark.parametrize("operation", checks.CALLS)
def test_a_seed_draws_the_same_case_again(operation: str) -> None:
    with GuardedMemory() as memory:
        first, second = (checks.draw_case(operation, 11, 0, memory) for _ in range(2))
        assert first.call.arguments == second.call.arguments
        for a, b in zip(first.tensors, second.tensors, strict=True):
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__.strip("_"))
def test_a_layout_keeps_the_shape(layout: Callable[..., Tensor]) -> None:
    tensor = torch.arange(120.0).view(2, 3, 4, 5)
    laid = layout(tensor, Draw(3))
    assert laid.shape == tensor.shape
    if layout.__name__ not in ("_expanded", "_overlapping"):
        assert torch.equal(laid, tensor)


def test_guarded_memory_keeps_values_and_strides() -> None:
    tensor = in_layout(torch.arange(24.0).view(2, 3, 4), Draw(5)).transpose(0, 2)
    with GuardedMemory() as memory:
        for at_end in (True, False):
            copy = memory.copy(tensor, at_end)
            assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
