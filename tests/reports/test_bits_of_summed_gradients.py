"""Kind: bits that change with strides, where torch's own operators sum what the kernels left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

from ..cases import normal


def heads_inside_rows(t: Tensor) -> Tensor:
    return t.transpose(-3, -2).contiguous().transpose(-3, -2)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def spread(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside rows": heads_inside_rows,
    "transposed": transposed,
    "spread": spread,
}

# query, key and value; of some the gradient is a sum over batches, or over the heads of a group
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "broadcast key and value": ((37, 4, 9, 16), (1, 4, 11, 16), (1, 4, 11, 16)),
    "broadcast query": ((1, 4, 9, 16), (37, 4, 11, 16), (37, 4, 11, 16)),
    "broadcast heads": ((3, 40, 9, 16), (3, 1, 11, 16), (3, 40, 11, 16)),
    "plain": ((2, 4, 9, 16), (2, 4, 11, 16), (2, 4, 11, 16)),
}


def gradients(tensors: list[Tensor], is_second: bool) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = F.scaled_dot_product_attention(*leaves)
    grad = normal(*output.shape, seed=9, dtype=torch.float32).requires_grad_(is_second)
    first = torch.autograd.grad(output, leaves, grad, create_graph=is_second)
    if not is_second:
        return list(first)
    seeds = [normal(*g.shape, seed=10 + i, dtype=torch.float32) for i, g in enumerate(first)]
    return list(torch.autograd.grad(first, [*leaves, grad], seeds))


@pytest.mark.parametrize("is_second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_attention_have_the_bits_of_contiguous_arguments(
    isa: str, name: str, layout: str, is_second: bool
) -> None:
    shapes = SHAPES[name]
    if isa == "simt":  # which is slow, and sums no batches itself
        shapes = tuple((min(shape[0], 3), min(shape[1], 3), *shape[2:]) for shape in shapes)
    plain = [normal(*shape, seed=seed, dtype=torch.float32) for seed, shape in enumerate(shapes, 1)]
    expected = gradients(plain, is_second)
    for position in range(3):
        arranged = [LAYOUTS[layout](t) if i == position else t for i, t in enumerate(plain)]
        for a, e in zip(gradients(arranged, is_second), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
