"""The cross-entropy loss of a linear layer as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import functional


class _LinearCrossEntropyLoss(torch.nn.modules.loss._WeightedLoss):
    """What torch 2.13 calls ``torch.nn.LinearCrossEntropyLoss``, for the releases before it."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = torch.nn.Linear(
            in_features, num_classes * math.prod(out_features), bias=bias, device=device, dtype=dtype
        )
        self.options = options

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, "
            f"out_features={self.out_features}, bias={self.linear.bias is not None}, reduction={self.reduction}, "
            f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, options={self.options}"
        )


class LinearCrossEntropyLoss(getattr(torch.nn, "LinearCrossEntropyLoss", _LinearCrossEntropyLoss)):  # type: ignore[misc]
    """``torch.nn.LinearCrossEntropyLoss`` computed by :func:`dlkernels.functional.linear_cross_entropy`.

    Examples:
        >>> loss = LinearCrossEntropyLoss(16, 1000)
        >>> loss(torch.zeros(4, 16), torch.tensor([1, 2, 3, 4])).detach()  # log 1000
        tensor(6.9078)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of ``input`` ``[N, in]`` or ``[in]`` for class indices or probabilities ``target``."""
        outputs = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*outputs, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )
