"""Stochastic depth (Huang et al. 2016): residual branches that are left out at random while training."""

from __future__ import annotations

import torch
from torch import Tensor


class StochasticDepth(torch.nn.Module):
    """Zeroes its input with probability ``p`` and divides what is kept by ``1 - p``; does nothing in evaluation.

    At the end of a residual branch, as ``torchvision.ops.StochasticDepth``: where the branch is zero, only the skip
    connection is left.

    Args:
        p: probability of leaving a branch out, in [0, 1].
        mode: ``"row"`` decides for each example alone, ``"batch"`` for all of them together.

    Raises:
        ValueError: ``p`` is outside [0, 1], or ``mode`` is another word.

    Examples:
        >>> output = StochasticDepth(0.5, "row")(torch.ones(8, 3))
        >>> set(output.flatten().tolist()) <= {0.0, 2.0}  # whole rows of either
        True
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be between 0 and 1, got {p}")
        if mode not in ("batch", "row"):
            raise ValueError(f"mode must be 'batch' or 'row', got {mode!r}")
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        """``[N, ...]`` to the same shape."""
        if not self.training or self.p == 0.0:
            return input
        rows = input.shape[0] if self.mode == "row" else 1
        ones = input.new_ones(rows, *[1] * (input.dim() - 1))  # [N or 1, 1, ...]
        return input * torch.nn.functional.dropout(ones, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}"
