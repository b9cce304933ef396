"""Batch norm: the mean of a channel is as exact as its type holds it, however its elements are spread over vectors."""

from __future__ import annotations

import pytest
import torch

from dlkernels import functional as F


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(64, 31, 1, 1), (37, 64, 6, 1), (3, 5, 40, 41)])
def test_running_mean_is_rounded_once(isa: str, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(memory_format=memory_format)
    mean, variance = torch.zeros(shape[1]), torch.ones(shape[1])
    F.batch_norm(x, mean, variance, None, None, True, 1.0)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=2**-22, atol=2**-25)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(9, 7, 1), (2, 33, 31)])
def test_equal_numbers_become_zero(
    isa: str, size: tuple[int, int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    values = torch.tensor([0.1, -3.3, 1e5 + 0.7], dtype=dtype)
    x = values.view(1, 3, 1, 1).expand(size[0], 3, *size[1:]).contiguous(memory_format=memory_format)
    y = F.batch_norm(x, None, None, None, None, True)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=0)


def test_second_derivatives_of_equal_numbers() -> None:
    """Without variance all that is left of centred numbers is the rounding of the mean."""
    results = []
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([1.8691232, 0.1]).to(dtype).view(1, 2, 1).expand(11, 2, 5).clone().requires_grad_()
        grad, direction = (torch.randn(11, 2, 5, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))
        y = F.batch_norm(x, None, None, training=True)
        (first,) = torch.autograd.grad(y, x, grad.requires_grad_(), create_graph=True)
        results.append(torch.autograd.grad((first * direction).sum(), [x, grad]))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
