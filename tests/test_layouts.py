"""Strides never change a bit: every tensor argument and every incoming gradient in every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from .cases import Case, Sample, all_cases, call, gradients, random_like


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan") if t.is_floating_point() else 0, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def odd_offset(t: Tensor) -> Tensor:
    storage = torch.empty(t.numel() + 3, dtype=t.dtype)
    view = storage[3:].view(t.shape)
    view.copy_(t)
    return view


def padded_rows(t: Tensor) -> Tensor:
    wide = torch.empty((*t.shape[:-1], t.shape[-1] + 5), dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "sliced": sliced,
    "odd_offset": odd_offset,
    "padded_rows": padded_rows,
    "channels_last": channels_last,
}


def run(case: Case, sample: Sample, arrange_grad: Callable[[Tensor], Tensor] = lambda g: g) -> list[Tensor]:
    """Outputs and gradients of a call; leaves are views with the strides under test."""
    for position in sample.differentiable():
        sample.args[position].requires_grad_()
    outputs = call(case.function, sample)
    grads = [arrange_grad(g) for g in random_like([o for o in outputs if o.requires_grad])]
    return [*outputs, *gradients(outputs, sample, grads)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_any_layout_of_any_argument_gives_the_same_bits(case: Case, layout: str) -> None:
    expected = run(case, case.build(torch.float32))
    arrange = LAYOUTS[layout]
    sample = case.build(torch.float32)
    for position, value in enumerate(sample.args):
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        varied = case.build(torch.float32)
        args = list(varied.args)
        args[position] = arrange(args[position])
        assert_same_bits(run(case, Sample(tuple(args), varied.kwargs)), expected)
    for name, value in sample.kwargs.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            varied = case.build(torch.float32)
            assert_same_bits(run(case, Sample(varied.args, {**varied.kwargs, name: arrange(value)})), expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_any_layout_of_the_incoming_gradient_gives_the_same_bits(case: Case, layout: str) -> None:
    def expanded(g: Tensor) -> Tensor:
        return g.flatten()[:1].expand(g.numel()).view(g.shape) if g.dim() else g

    def arrange(g: Tensor) -> Tensor:
        return g if g.dim() == 0 else LAYOUTS.get(layout, expanded)(g)

    if layout == "expanded":
        expected = run(case, case.build(torch.float32), lambda g: expanded(g).contiguous())
    else:
        expected = run(case, case.build(torch.float32))
    assert_same_bits(run(case, case.build(torch.float32), arrange), expected)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_inputs_are_never_modified(case: Case) -> None:
    sample, copy = case.build(torch.float32), case.build(torch.float32)
    run(case, sample)
    for a, b in zip(sample.args, copy.args, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
