"""Kind: attention whose largest score of a row is huge or hugely negative. What counts are differences of scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

from ..cases import normal
from ..cases.attention import reference

# Largest relative errors: roundings of the probabilities and of the result.
ERROR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROWS = [1, 5, 40]  # as a step of generation, fewer than a tile has, whole tiles
KEYS, HEAD_SIZE = 40, 32


def run(function: object, tensors: list[Tensor], **kwargs: object) -> list[Tensor]:
    """Output and gradients of all tensors; a fourth one is the mask."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, **kwargs)  # type: ignore[operator]
    grad = normal(*output.shape, seed=9, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_close_to_float32(dtype: torch.dtype, actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert (a.to(e.dtype) - e).norm() <= ERROR[dtype] * e.norm() + 1e-30


def inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((2, 3, rows, HEAD_SIZE), (2, 3, KEYS, HEAD_SIZE), (2, 3, KEYS, HEAD_SIZE))
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes, 1)]


def at_least_float32(tensors: list[Tensor]) -> list[Tensor]:
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


@pytest.mark.parametrize("rows", ROWS)
def test_left_padded_rows_masked_by_the_smallest_number(isa: str, dtype: torch.dtype, rows: int) -> None:
    """As generation is trained: causal, the first keys of a sequence hidden, and its first queries see nothing."""
    lowest = torch.finfo(dtype).min
    query, key, value = inputs(rows, dtype)
    padding = torch.tensor([0, 11], device=query.device)[:, None, None, None]
    row, column = (
        torch.arange(rows, device=query.device)[:, None] + KEYS - rows,
        torch.arange(KEYS, device=query.device),
    )
    visible = (column <= row) & (column >= padding)
    visible[1, :, : rows // 2] = False
    mask = torch.zeros(visible.shape, dtype=dtype, device=query.device).masked_fill(~visible, lowest)
    tensors = [query, key, value, mask]
    actual = run(F.scaled_dot_product_attention, tensors)
    assert_close_to_float32(dtype, actual, run(reference, at_least_float32(tensors)))
    if rows > 1 and dtype != torch.float16:  # whose smallest number leaves differences of scores
        average = value[1].mean(-2, keepdim=True).expand(-1, rows // 2, -1)
        torch.testing.assert_close(actual[0][1, :, : rows // 2], average, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scale", [None, 0.3, -0.3])
@pytest.mark.parametrize("sign", [-1, 1], ids=["negative", "positive"])
def test_scores_beyond_billions_without_a_mask(
    isa: str, dtype: torch.dtype, rows: int, scale: float | None, sign: int
) -> None:
    """Products of powers of two, whose sums are exact: equal scores give an average, the largest one everything."""
    huge = 2.0**15 if dtype == torch.float16 else 2.0**18
    _, _, value = inputs(rows, dtype)
    query = torch.full((2, 3, rows, HEAD_SIZE), sign * huge, dtype=dtype, device=value.device)
    key = torch.full_like(value, huge)
    actual = run(F.scaled_dot_product_attention, [query, key, value], scale=scale)
    assert all(t.isfinite().all() for t in actual)
    gradient = normal(*query.shape, seed=9, dtype=torch.float64).to(dtype).to(actual[0].device)
    average = value.mean(-2, keepdim=True).expand_as(query)
    torch.testing.assert_close(actual[0], average, rtol=0.02, atol=0.01)
    share = (gradient.double().sum(-2, keepdim=True) / KEYS).expand_as(value).to(dtype)
    torch.testing.assert_close(actual[3], share, rtol=0.02, atol=1e-3)

    largest = 17
    key[..., largest, :] *= 0.5 if sign * (scale or 1) < 0 else 1
    others = torch.arange(KEYS) != largest
    if sign * (scale or 1) > 0:
        key[..., others, :] *= 0.5
    actual = run(F.scaled_dot_product_attention, [query, key, value], scale=scale)
    assert all(t.isfinite().all() for t in actual)
    torch.testing.assert_close(actual[0], value[..., largest : largest + 1, :].expand_as(query), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(actual[3][..., largest, :], gradient.sum(-2), rtol=1e-2, atol=1e-2)
    assert (actual[3][..., others, :] == 0).all()


@pytest.mark.parametrize("rows", ROWS)
def test_a_mask_of_the_largest_number_leaves_one_key(isa: str, dtype: torch.dtype, rows: int) -> None:
    query, key, value = inputs(rows, dtype)
    mask = torch.zeros(KEYS, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=query.device)
    mask[0] = 3e38
    output, grad_query, grad_key, grad_value, grad_mask = run(F.scaled_dot_product_attention, [query, key, value, mask])
    torch.testing.assert_close(output, value[..., :1, :].expand_as(output), rtol=1e-2, atol=1e-3)
    gradient = normal(*query.shape, seed=9, dtype=torch.float64).to(dtype).to(output.device)
    torch.testing.assert_close(grad_value[..., 0, :], gradient.sum(-2), rtol=1e-2, atol=1e-2)
    assert (grad_value[..., 1:, :] == 0).all()
    for t in (grad_query, grad_key, grad_mask):
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-2)


@pytest.mark.parametrize("rows", ROWS)
def test_a_row_of_minus_infinity_gives_zeros_and_finite_gradients(isa: str, dtype: torch.dtype, rows: int) -> None:
    query, key, value = inputs(rows, dtype)
    mask = torch.zeros(rows, KEYS, dtype=dtype, device=query.device)
    mask[rows // 2] = -torch.inf
    actual = run(F.scaled_dot_product_attention, [query, key, value, mask])
    assert all(t.isfinite().all() for t in actual)
    assert (actual[0][..., rows // 2, :] == 0).all()
    assert (actual[1][..., rows // 2, :] == 0).all()
