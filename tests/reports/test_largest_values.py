"""Kind: squares of numbers that their type holds, but not the squares. Batch norm of the largest numbers is as exact as
of ordinary ones, forward and backward, and does not change its neighbours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from dlkernels import functional

# Largest relative error of an element against its tensor's largest, by type.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
SCALES = (1e18, 3e19, 1e25, 1e38)


def images(dtype: torch.dtype, scales: tuple[float, ...], shape: tuple[int, ...] = (4, 0, 9, 7)) -> Tensor:
    """A channel for each of the scales."""
    unit = torch.rand(shape[0], len(scales), *shape[2:], dtype=torch.float64) * 2 - 0.9
    return (unit * torch.tensor(scales, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2))).to(dtype)


def results(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, cotangent: Tensor
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


def train(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, bias: function(x, None, None, weight, bias, True)


def assert_channels_close(ours: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for i, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        # Channels apart: their gradients differ by dozens of orders.
        channels = [t.double().movedim(1, 0).flatten(1) if t.dim() > 1 else t.double()[:, None] for t in (mine, other)]
        largest = channels[1].abs().amax(1, keepdim=True).clamp_min(1e-300)
        error = ((channels[0] - channels[1]).abs() / largest).amax()
        assert error <= bound, (i, error)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_batch_norm_of_numbers_whose_squares_overflow(isa: str, dtype: torch.dtype, channels_last: bool) -> None:
    x = images(dtype, (*SCALES, 1.0))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.rand(len(x[0])) + 0.5, torch.randn(len(x[0]))
    # Gradients as large as the inputs, so that they are no subnormal numbers once divided by the deviation.
    cotangent = torch.randn(x.shape) * torch.tensor((*SCALES, 1.0)).clamp_max(1e18).reshape(-1, 1, 1)
    ours = results(train(functional.batch_norm), x, weight, bias, cotangent)
    wide = [t.double() for t in (x, weight, bias, cotangent.to(dtype))]
    assert_channels_close(ours, results(train(torch_functional.batch_norm), *wide), BOUNDS[dtype])


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activation_and_residual_of_such_channels(isa: str, activation: str) -> None:
    x, residual = images(torch.float32, (1e30, 1.0, 3e38)), torch.randn(4, 3, 9, 7)
    expected = torch_functional.batch_norm(x.double(), None, None, training=True) + residual
    expected = expected.relu() if activation == "relu" else expected.clamp(0, 6)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    ours = functional.batch_norm(x, None, None, training=True, activation=activation, residual=residual)
    torch.testing.assert_close(ours, expected.float(), atol=2e-6, rtol=2e-6)
    (grad_residual,) = torch.autograd.grad(ours.sum(), residual)
    passes = (ours > 0) & ((ours < 6) if activation == "relu6" else torch.tensor(True))
    assert torch.equal(grad_residual, passes.float())


def test_channels_beside_such_a_channel_keep_their_bits(isa: str) -> None:
    x = torch.randn(4, 8, 6, 6)
    beside = x.clone()
    beside[:, 3] *= 1e30
    weight, bias, cotangent = torch.rand(8), torch.randn(8), torch.randn(x.shape)
    others = [c for c in range(8) if c != 3]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        plain, mixed = (
            results(train(functional.batch_norm), t.to(memory_format=memory_format), weight, bias, cotangent)
            for t in (x, beside)
        )
        for a, b in zip(plain, mixed, strict=True):
            a, b = (t[:, others] if t.dim() > 1 else t[others] for t in (a, b))
            if isa in ("simt", "cuda"):  # a thread's neighbours are done with it in double, and rounded once
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
            else:
                assert torch.equal(a, b)


def test_both_layouts_give_such_channels_the_same_bits(processor_isa: str) -> None:
    x, cotangent = images(torch.float32, (1e25, 1e38, 1.0)), torch.randn(4, 3, 9, 7)
    weight, bias = torch.rand(3), torch.randn(3)
    contiguous, channels_last = (
        results(train(functional.batch_norm), x.to(memory_format=f), weight, bias, cotangent)
        for f in (torch.contiguous_format, torch.channels_last)
    )
    for a, b in zip(contiguous, channels_last, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mean", [0.0, 2e38])
def test_evaluation_with_statistics_of_such_channels(isa: str, mean: float) -> None:
    x = images(torch.float32, (1e38, 3e38))
    statistics = torch.full((2,), mean), torch.full((2,), 3e38)
    ours, expected = (
        function(t, *(s.to(t.dtype) for s in statistics), training=False)
        for function, t in ((functional.batch_norm, x), (torch_functional.batch_norm, x.double()))
    )
    torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("statistic", [0, 1])
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_evaluation_with_an_infinite_statistic(isa: str, dtype: torch.dtype, statistic: int, value: float) -> None:
    x, weight, bias = torch.randn(3, 2, 4, 4, dtype=dtype), torch.tensor([1.0, -2.0]).to(dtype), torch.ones(2).to(dtype)
    statistics = [torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)]
    statistics[statistic].fill_(value if statistic == 0 else abs(value))
    ours, expected = (
        function(x, *statistics, weight, bias) for function in (functional.batch_norm, torch_functional.batch_norm)
    )
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_weight_over_the_deviation_that_overflows(isa: str, channels_last: bool) -> None:
    x = images(torch.float32, (0.05, 1.0))
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias, cotangent = torch.tensor([1e38, 2.0]), torch.randn(2), torch.randn(x.shape) * 1e-3
    ours = results(train(functional.batch_norm), x, weight, bias, cotangent)
    wide = [t.double() for t in (x, weight, bias, cotangent)]
    assert_channels_close(ours, results(train(torch_functional.batch_norm), *wide), 2e-6)


def test_large_gradients_alone(isa: str) -> None:
    x, cotangent = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8) * 1e37
    ours = results(train(functional.batch_norm), x, torch.ones(2), torch.zeros(2), cotangent)
    expected = results(
        train(torch_functional.batch_norm), *(t.double() for t in (x, torch.ones(2), torch.zeros(2), cotangent))
    )
    assert_channels_close(ours, expected, 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_channel_nan_and_no_other(isa: str, value: float) -> None:
    x = torch.randn(4, 3, 5, 5)
    x[1, 1, 2, 2] = value
    x.requires_grad_()
    output = functional.batch_norm(x, None, None, training=True)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    for result in (output, gradient):
        assert result[:, 1].isnan().all() and result[:, [0, 2]].isfinite().all()
