"""Kind: the gradient of an argument that is broadcast to nothing: a sum of no terms, zeros of the argument's shape."""

from __future__ import annotations

import pytest
import torch

from dlkernels import functional as F

from ..cases import normal

# query, key, value and mask of calls without a single score
CALLS = {
    "no queries": ((3, 6, 0, 16), (3, 6, 7, 16), (3, 6, 7, 16), (1, 7)),
    "no batch": ((0, 3, 4, 65, 80), (0, 3, 4, 19, 80), (0, 3, 4, 19, 80), (65, 19)),
    "no batch, mask of heads": ((0, 4, 5, 8), (0, 4, 6, 8), (0, 4, 6, 8), (4, 1, 6)),
    "no heads": ((2, 0, 5, 8), (2, 0, 6, 8), (2, 0, 6, 8), (5, 6)),
    "no keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8), (5, 1)),
    "no keys, one mask": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8), ()),
    "no queries, two dimensions": ((0, 8), (7, 8), (7, 8), (1, 7)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mask_type", [None, torch.float32], ids=["own type", "float32"])
def test_gradients_of_attention_without_scores_are_zeros(
    isa: str, dtype: torch.dtype, mask_type: torch.dtype | None, name: str
) -> None:
    *inputs, mask = (
        normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(CALLS[name], 1)
    )
    mask = mask.detach().to(mask_type or dtype).requires_grad_()
    output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    for leaf, gradient in zip([*inputs, mask], torch.autograd.grad(output.sum(), [*inputs, mask]), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(leaf), rtol=0, atol=0)


# query, key and value of calls with empty sides and arguments that are broadcast
BROADCAST_CALLS = {
    "no queries": ((2, 3, 0, 8), (1, 3, 6, 8), (2, 1, 6, 8)),
    "no batch": ((0, 3, 5, 8), (1, 3, 6, 8), (1, 1, 6, 8)),
    "no keys": ((1, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 4)),
    "no head size": ((2, 3, 5, 0), (1, 3, 6, 0), (1, 3, 6, 4)),
    "no value size": ((2, 3, 5, 8), (1, 3, 6, 8), (1, 3, 6, 0)),
}


@pytest.mark.parametrize("name", BROADCAST_CALLS)
def test_gradients_of_broadcast_inputs_that_nothing_reads_are_zeros(isa: str, dtype: torch.dtype, name: str) -> None:
    inputs = [
        normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(BROADCAST_CALLS[name], 1)
    ]
    output = F.scaled_dot_product_attention(*inputs)
    query, key, value = torch.autograd.grad(output.sum(), inputs)
    torch.testing.assert_close(query, torch.zeros_like(query), rtol=0, atol=0)
    torch.testing.assert_close(key, torch.zeros_like(key), rtol=0, atol=0)
    if name == "no head size":  # every score is 0: an average of the values, for each of 2 x 5 queries
        torch.testing.assert_close(value, torch.full_like(value, 10 / 6))
    else:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=0)


def test_second_derivatives_where_there_are_no_heads_to_share() -> None:
    inputs = [torch.empty(2, 0, size, 4, requires_grad=True) for size in (5, 6, 6)]
    output = F.scaled_dot_product_attention(*inputs, enable_gqa=True)
    grad = torch.empty_like(output, requires_grad=True)
    first = torch.autograd.grad(output, inputs, grad, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, grad], allow_unused=True)
    assert all(g is None or g.numel() == 0 for g in second)
