"""Positions: the formula of the paper, and learned ones."""

from __future__ import annotations

import math

import pytest
import torch

from dlkernels import nn


@pytest.mark.parametrize("features", [1, 6, 7])
@pytest.mark.parametrize("first", [0, 5, 100_000])
def test_sinusoids_follow_the_formula(features: int, first: int) -> None:
    expected = torch.empty(4, features, dtype=torch.float64)
    for row in range(4):
        for i in range(features):
            angle = (first + row) / 10000 ** (2 * (i // 2) / features)
            expected[row, i] = math.cos(angle) if i % 2 else math.sin(angle)
    x = torch.randn(2, 3, 4, features, dtype=torch.float64)
    positions = nn.SinusoidalPositions()
    torch.testing.assert_close(positions(x, first), x + expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(positions(x.float(), first), (x + expected).float(), rtol=0, atol=1e-6)
    assert positions(x.bfloat16()).dtype == torch.bfloat16
    assert not positions.state_dict()


def test_learned_positions_are_rows_of_their_weight() -> None:
    positions = nn.LearnedPositions(7, 5)
    assert positions.weight.shape == (7, 5)
    x = torch.randn(2, 3, 5)
    assert torch.equal(positions(x), x + positions.weight[:3])
    assert torch.equal(positions(x, 4), x + positions.weight[4:])
    with pytest.raises(ValueError, match="a sequence has at most 7 positions, got 8"):
        positions(x, 5)


def test_learned_positions_begin_small() -> None:
    assert nn.LearnedPositions(100, 100).weight.std().item() == pytest.approx(0.02, rel=0.05)
