"""Maxout (Goodfellow et al. 2013): an activation that is learned, the largest of several linear functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import Linear


class Maxout(torch.nn.Module):
    """Each output is the largest of ``pieces`` linear functions of the input, so any convex function of it, in pieces.

    ReLU, leaky ReLU and the absolute value are maxouts of two pieces. It saturates nowhere, and costs ``pieces`` times
    the parameters of a linear layer.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        pieces: linear functions for each output.
        bias: whether they have one.

    Raises:
        ValueError: ``pieces`` is not positive.

    Examples:
        >>> absolute = Maxout(1, 1, pieces=2, bias=False)
        >>> absolute.linear.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> absolute(torch.tensor([[-3.0], [2.0]])).detach()
        tensor([[3.],
                [2.]])
    """

    def __init__(self, in_features: int, out_features: int, pieces: int, bias: bool = True) -> None:
        super().__init__()
        if pieces < 1:
            raise ValueError(f"pieces must be positive, got {pieces}")
        self.out_features = out_features
        self.pieces = pieces
        self.linear = Linear(in_features, out_features * pieces, bias)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        pieces = self.linear(input).unflatten(-1, (self.out_features, self.pieces))  # [..., out, pieces]
        return pieces.amax(-1)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}"
