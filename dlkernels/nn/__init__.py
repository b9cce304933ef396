"""Modules that subclass those of ``torch.nn``: same constructors, parameters and ``state_dict``; our kernels inside."""

from .attention import MultiheadAttention
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .conv2d import Conv2d
from .cross_entropy import CrossEntropyLoss
from .drop_connect import DropConnectLinear
from .fused import Sequential, norm_activation
from .linear import Linear
from .linear_cross_entropy import LinearCrossEntropyLoss
from .lstm import LSTM, LSTMCell
from .maxout import Maxout
from .positions import LearnedPositions, SinusoidalPositions
from .stochastic_depth import StochasticDepth

__all__ = [
    "LSTM",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv2d",
    "CrossEntropyLoss",
    "DropConnectLinear",
    "LSTMCell",
    "LearnedPositions",
    "Linear",
    "LinearCrossEntropyLoss",
    "Maxout",
    "MultiheadAttention",
    "Sequential",
    "SinusoidalPositions",
    "StochasticDepth",
    "norm_activation",
]
