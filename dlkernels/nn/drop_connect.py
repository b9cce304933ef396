"""DropConnect (Wan et al. 2013): dropout of weights instead of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional
from .linear import Linear


class DropConnectLinear(Linear):
    """A linear layer that leaves each of its weights out with probability ``p`` while training.

    Inverted scaling: weights that stay are divided by ``1 - p``, so that evaluation uses all of them as they are, the
    mean of what training uses. One mask serves a whole mini-batch, as in Merity et al. 2018, so that a batch remains
    one product; Wan et al. draw one for each example, and in evaluation average activations over Gaussian samples.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to add a bias, which is never left out.
        p: probability of leaving a weight out, in [0, 1].

    Raises:
        ValueError: ``p`` is outside [0, 1].

    Examples:
        >>> layer = DropConnectLinear(16, 4, p=0.5)
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, p: float = 0.5) -> None:
        super().__init__(in_features, out_features, bias)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be between 0 and 1, got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        weight = torch.nn.functional.dropout(self.weight, self.p, self.training)
        return functional.linear(input, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
