"""The cross-entropy loss as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` computed by :func:`dlkernels.functional.cross_entropy`.

    Examples:
        >>> CrossEntropyLoss(reduction="sum")(torch.zeros(3, 10), torch.tensor([4, 0, 9]))  # 3 log 10
        tensor(6.9078)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of logits ``input`` ``[N, C, ...]`` for class indices or probabilities ``target``."""
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
