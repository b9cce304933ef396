"""Modules that subclass those of ``torch.nn``: same constructors, parameters and ``state_dict``; our kernels inside."""

from .attention import MultiheadAttention
from .cross_entropy import CrossEntropyLoss

__all__ = ["CrossEntropyLoss", "MultiheadAttention"]
