"""The linear layer as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` computed by :func:`dlkernels.functional.linear`.

    Examples:
        >>> Linear(16, 4)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return functional.linear(input, self.weight, self.bias)
