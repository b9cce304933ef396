"""Kind: the shape of nothing. Attention to no keys broadcasts batch dimensions as attention to some does."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlkernels import functional as F

from ..cases import normal

# query, key and value, output
CALLS = [
    ((1, 2, 4, 3, 8), (2, 2, 1, 0, 8), (2, 2, 1, 0, 8), (2, 2, 4, 3, 8)),
    ((1, 4, 3, 8), (2, 1, 0, 8), (2, 1, 0, 5), (2, 4, 3, 5)),
    ((4, 3, 8), (2, 1, 0, 8), (2, 1, 0, 8), (2, 4, 3, 8)),
    ((1, 4, 0, 8), (2, 1, 5, 8), (2, 1, 5, 8), (2, 4, 0, 8)),
    ((2, 4, 3, 8), (1, 4, 0, 8), (2, 1, 0, 8), (2, 4, 3, 8)),
    ((3, 8), (0, 8), (0, 5), (3, 5)),
]


@pytest.mark.parametrize(("query", "key", "value", "output"), CALLS, ids=str)
def test_attention_to_no_keys_gives_zeros_of_the_broadcast_shape(
    isa: str,
    dtype: torch.dtype,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    output: tuple[int, ...],
) -> None:
    inputs = [normal(*shape, seed=1, dtype=dtype).requires_grad_() for shape in (query, key, value)]
    actual = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(actual, torch.zeros_like(actual), rtol=0, atol=0)
    assert tuple(actual.shape) == output
    for leaf, gradient in zip(inputs, torch.autograd.grad(actual.sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(leaf), rtol=0, atol=0)


@pytest.mark.parametrize(("query", "key", "value", "output"), CALLS, ids=str)
def test_fakes_of_attention_to_no_keys_have_the_broadcast_shape(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], output: tuple[int, ...]
) -> None:
    inputs = [torch.zeros(shape) for shape in (query, key, value)]
    with FakeTensorMode() as mode:
        assert tuple(F.scaled_dot_product_attention(*map(mode.from_tensor, inputs)).shape) == output
    assert tuple(F.scaled_dot_product_attention(*(t.to("meta") for t in inputs)).shape) == output


def test_no_heads_are_grouped(isa: str, dtype: torch.dtype) -> None:
    query, key = (normal(2, 0, length, 4, seed=1, dtype=dtype).requires_grad_() for length in (5, 3))
    output = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    assert output.shape == (2, 0, 5, 4)
    assert [g.shape for g in torch.autograd.grad(output.sum(), [query, key])] == [query.shape, key.shape]
