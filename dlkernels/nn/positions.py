"""Positions, added to a sequence of features so that attention can tell the order of its rows."""

from __future__ import annotations

import torch
from torch import Tensor


class SinusoidalPositions(torch.nn.Module):
    """Adds sines and cosines of geometrically spaced wavelengths (Vaswani et al. 2017, section 3.5).

    Feature ``2i`` of position ``p`` is ``sin(p / 10000^(2i / features))``, feature ``2i + 1`` the cosine. There is
    nothing to learn and no greatest length; an odd number of features ends with a sine.

    Examples:
        >>> SinusoidalPositions()(torch.zeros(2, 2))
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])
    """

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """``x`` ``[..., T, features]`` plus the encodings of positions ``first`` to ``first + T - 1``."""
        length, features = x.shape[-2:]
        # In float64: a large position times a rounded rate is an angle with few right digits.
        positions = torch.arange(first, first + length, dtype=torch.float64, device=x.device)
        exponents = torch.arange(0, features, 2, dtype=torch.float64, device=x.device) / features
        angles = positions.unsqueeze(1) / 10000**exponents  # [T, features / 2]
        encodings = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # [T, features]
        return x + encodings[:, :features].to(x.dtype)


class LearnedPositions(torch.nn.Module):
    """Adds a learned vector for each position (Gehring et al. 2017; Radford et al. 2018).

    Args:
        max_length: number of positions.
        features: size of each vector, drawn from a normal distribution of standard deviation 0.02.

    Examples:
        >>> positions = LearnedPositions(max_length=128, features=16)
        >>> torch.equal(positions(torch.zeros(3, 16), first=5), positions.weight[5:8])
        True
    """

    def __init__(self, max_length: int, features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(max_length, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """``x`` ``[..., T, features]`` plus the vectors of positions ``first`` to ``first + T - 1``.

        Raises:
            ValueError: there are fewer positions than that.
        """
        end = first + x.shape[-2]
        if end > self.weight.shape[0]:
            raise ValueError(f"a sequence has at most {self.weight.shape[0]} positions, got {end}")
        return x + self.weight[first:end]
