"""Modules that subclass those of ``torch.nn``: same constructors, parameters and ``state_dict``; our kernels inside."""

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .cross_entropy import CrossEntropyLoss
from .lstm import LSTM, LSTMCell

__all__ = ["LSTM", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "CrossEntropyLoss", "LSTMCell"]
