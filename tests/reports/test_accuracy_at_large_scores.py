"""Kind: accuracy at large scores, where the rounding of a score is no small part of a probability."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

from ..cases import normal
from ..cases.attention import reference

SEEDS = range(8)


def run(function: Callable[..., Tensor], tensors: list[Tensor], scale: float) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, scale=scale)
    grad = normal(*output.shape, seed=99, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize(("head_size", "queries", "keys"), [(128, 1, 33), (128, 2, 33), (128, 33, 33), (64, 20, 300)])
def test_attention_is_as_accurate_as_torch(isa: str, head_size: int, queries: int, keys: int, scale: float) -> None:
    """Largest errors from float64, of means over some draws: of a single one they are luck. The gradients of query and
    key of a row that has all its weight on one key are what rounding leaves, and are measured by the value's."""
    ours, torchs = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in SEEDS:
        tensors = [
            normal(4, 3, rows, head_size, seed=3 * seed + i, dtype=torch.float32) * factor
            for i, (rows, factor) in enumerate(((queries, 5), (keys, 1), (keys, 1)))
        ]
        exact = run(reference, [t.double() for t in tensors], scale)
        size = torch.stack([e.abs().max() for e in exact]).cpu()
        size[1:] = torch.maximum(size[1:], size[3])
        for errors, function in ((ours, F.scaled_dot_product_attention), (torchs, reference)):
            found = run(function, tensors, scale)
            errors += torch.stack([(a - e).abs().max() for a, e in zip(found, exact, strict=True)]).cpu() / size
    assert (ours <= 1.25 * torchs + len(SEEDS) * 2.0**-24).all(), f"{ours / len(SEEDS)}, torch {torchs / len(SEEDS)}"
