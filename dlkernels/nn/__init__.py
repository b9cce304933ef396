"""Modules that subclass those of ``torch.nn``: same constructors, parameters and ``state_dict``; our kernels inside."""

from .cross_entropy import CrossEntropyLoss
from .linear_cross_entropy import LinearCrossEntropyLoss

__all__ = ["CrossEntropyLoss", "LinearCrossEntropyLoss"]
