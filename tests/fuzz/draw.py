"""What a case is drawn from: choices that depend on its seed alone, and values."""

from __future__ import annotations

import random
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

SMALL = (2, 3, 4, 5, 6, 7, 8, 9, 11, 13)
AROUND_VECTORS = (15, 16, 17, 19, 23, 24, 31, 32, 33, 37, 48, 63, 64, 65)
AROUND_BLOCKS = (96, 97, 127, 128, 129, 191, 256, 257, 384, 511, 512, 521, 768, 1021)


class Draw:
    """Draws one case. ``values_round`` changes the values and nothing else, to judge an error by several samples."""

    def __init__(self, seed: int, values_round: int = 0) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed((seed * 31 + values_round * 1_000_003) % 2**63)

    def one_of(self, *options: T) -> T:
        """Any of ``options``; one that is written twice comes twice as often."""
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        """True with ``probability``."""
        return self.random.random() < probability

    def size(self, zero: float = 0.02, large: bool = False) -> int:
        """A size: rarely 0, often 1, else small, around the width of a vector or, if ``large``, that of a block."""
        drawn = self.random.random()
        if drawn < zero:
            return 0
        if drawn < 0.2:
            return 1
        if drawn < 0.65:
            return self.one_of(*SMALL)
        return self.one_of(*AROUND_VECTORS) if drawn < 0.92 or not large else self.one_of(*AROUND_BLOCKS)

    def sizes(self, count: int, zero: float = 0.02) -> list[int]:
        """``count`` sizes."""
        return [self.size(zero) for _ in range(count)]

    def normal(self, *shape: int) -> Tensor:
        """Normal values in float64."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Values of [0, 1) in float64."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def values(self, *shape: int) -> Tensor:
        """Normal values, sometimes far from zero, large, whole or small."""
        kind = self.random.random()
        values = self.normal(*shape)
        if kind < 0.08:
            return values + 30
        if kind < 0.14:
            return values * 30
        if kind < 0.18:
            return (values * 2).round()
        return values.abs() * 1e-3 if kind < 0.2 else values

    def classes(self, shape: list[int], count: int) -> Tensor:
        """Indices below ``count``."""
        return torch.randint(0, max(count, 1), shape, generator=self.generator)
