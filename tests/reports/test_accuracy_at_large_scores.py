"""Kind: accuracy at large scores, where the rounding of a score is no small part of a probability."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlkernels import functional as F

from ..cases import normal
from ..cases.attention import reference

SEEDS = range(6)


def run(function: Callable[..., Tensor], tensors: list[Tensor], scale: float) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, scale=scale)
    grad = normal(*output.shape, seed=99, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize(("head_size", "queries", "keys"), [(128, 1, 33), (128, 2, 33), (128, 33, 33), (64, 20, 300)])
def test_attention_is_as_accurate_as_torch(isa: str, head_size: int, queries: int, keys: int, scale: float) -> None:
    """Errors from float64, as norms over some draws: of one they are luck. What rounding leaves of the gradients of
    query and key, where rows have all their weight on one key, is measured by the gradient of value."""
    ours, torchs, size = (torch.zeros(4, dtype=torch.float64) for _ in range(3))
    batches = 16 if queries <= 2 and isa != "simt" else 1  # the simulator is slow
    for seed in SEEDS:
        tensors = [
            normal(batches, 12, rows, head_size, seed=3 * seed + i, dtype=torch.float32) * factor
            for i, (rows, factor) in enumerate(((queries, 5), (keys, 1), (keys, 1)))
        ]
        exact = run(reference, [t.double() for t in tensors], scale)
        size += torch.stack([e.square().sum() for e in exact]).cpu()
        for errors, function in ((ours, F.scaled_dot_product_attention), (torchs, reference)):
            found = run(function, tensors, scale)
            errors += torch.stack([(a - e).square().sum() for a, e in zip(found, exact, strict=True)]).cpu()
    size[1:] = torch.maximum(size[1:], size[3])
    ours, torchs = (ours / size).sqrt(), (torchs / size).sqrt()
    assert (ours <= 1.1 * torchs + 2.0**-25).all(), f"{ours}, torch {torchs}"
