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


def run(function: Callable[..., Tensor], tensors: list[Tensor], scale: float, **options: bool) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*leaves, scale=scale, **options)
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


@pytest.mark.parametrize(("group", "queries", "keys"), [(4, 5, 17), (1, 9, 31), (4, 4, 300)])
def test_gradients_take_the_scores_of_the_output(processor_isa: str, group: int, queries: int, keys: int) -> None:
    """Heads that share keys are one matrix of queries in forward, the gradient of a mask is a pass of its own: each is
    to round scores as forward did, whose sums divide the probabilities. Errors of the gradients of value and mask."""
    ours, torchs = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for seed in SEEDS:
        shapes = ((4, 2 * group, queries, 128), (4, 2, keys, 128), (4, 2, keys, 128), (4, 2 * group, queries, keys))
        tensors = [normal(*shape, seed=9 * seed + i, dtype=torch.float32) for i, shape in enumerate(shapes)]
        tensors[0] *= 5
        exact = run(reference, [t.double() for t in tensors], 1.0, enable_gqa=group > 1)[3:]
        for errors, function in ((ours, F.scaled_dot_product_attention), (torchs, reference)):
            found = run(function, tensors, 1.0, enable_gqa=group > 1)[3:]
            errors += torch.stack(
                [(a - e).square().sum() / e.square().sum() for a, e in zip(found, exact, strict=True)]
            )
    assert (ours <= 2 * torchs).all(), f"{ours}, torch {torchs}"
