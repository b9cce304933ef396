"""Second derivatives where no row counts, and where a row holds infinities: torch's zeros and numbers, and not NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

torch_functional = torch.nn.functional

Loss = Callable[..., Tensor]


def second_derivatives(loss: Loss, tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of the gradients by every tensor and by the gradient of the loss."""
    torch.manual_seed(1)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = loss(*leaves)
    cotangent = torch.randn_like(result).requires_grad_()
    first = torch.autograd.grad(result, leaves, cotangent, create_graph=True)
    total = sum((grad * torch.randn_like(grad)).sum() for grad in first)
    second = torch.autograd.grad(total, [*leaves, cotangent], allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in (*leaves, cotangent))
    return [*first, *(z if g is None else g for g, z in zip(second, zeros, strict=True))]


def check(ours: Loss, torchs: Loss, tensors: list[Tensor]) -> None:
    expected = second_derivatives(torchs, tensors)
    # A gradient of zeros does not depend on what comes in from above; torch multiplies by that loss, which is NaN.
    expected[-1] = expected[-1].nan_to_num(0.0)
    assert all(torch.isfinite(value).all() for value in expected)
    for found, value in zip(second_derivatives(ours, tensors), expected, strict=True):
        torch.testing.assert_close(found, value)


def loss_of(f: Loss, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float) -> Loss:
    return lambda x: f(x, target, weight, reduction=reduction, label_smoothing=smoothing)


def layer_loss_of(f: Loss, target: Tensor, weight: Tensor | None, reduction: str, smoothing: float) -> Loss:
    return lambda x, w, b: f(x, w, target, linear_bias=b, weight=weight, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["all", "some"])
def test_ignored_rows(ignored: str, reduction: str, weighted: bool, smoothing: float) -> None:
    rows = torch.full((4,), -100) if ignored == "all" else torch.tensor([1, -100, 0, -100])
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if weighted else None
    for shape, target in [((4, 5), rows), ((2, 5, 2), rows.view(2, 2))]:
        logits = torch.randn(shape, dtype=torch.float64)
        ours, torchs = (
            loss_of(f, target, weight, reduction, smoothing) for f in (F.cross_entropy, torch_functional.cross_entropy)
        )
        check(ours, torchs, [logits])
    layer = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (5, 3), (5,))]
    ours, torchs = (
        layer_loss_of(f, rows, weight, reduction, smoothing)
        for f in (F.linear_cross_entropy, torch_functional.linear_cross_entropy)
    )
    check(ours, torchs, layer)


def test_an_ignored_single_row() -> None:
    target = torch.tensor(-100)
    ours, torchs = (loss_of(f, target, None, "mean", 0.0) for f in (F.cross_entropy, torch_functional.cross_entropy))
    check(ours, torchs, [torch.randn(5, dtype=torch.float64)])


@pytest.mark.parametrize("weighted", [False, True])
def test_classes_that_are_ruled_out(weighted: bool) -> None:
    """A logit of minus infinity, as of a token that may not come, has no share in any derivative."""
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[:, 3] = -math.inf
    weight = torch.rand(5, dtype=torch.float64) + 0.5 if weighted else None
    ours, torchs = (
        loss_of(f, torch.tensor([0, 1, 2, 4]), weight, "mean", 0.0)
        for f in (F.cross_entropy, torch_functional.cross_entropy)
    )
    check(ours, torchs, [logits])


@pytest.mark.parametrize("filling", [math.nan, math.inf, -math.inf])
def test_what_an_ignored_row_holds_is_in_no_derivative(filling: float) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64)
    loss = loss_of(F.cross_entropy, torch.tensor([0, -100, 2]), None, "mean", 0.1)
    expected = second_derivatives(loss, [logits])
    logits[1] = filling
    for found, value in zip(second_derivatives(loss, [logits]), expected, strict=True):
        assert torch.equal(found, value)
