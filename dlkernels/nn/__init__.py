"""Modules that subclass those of ``torch.nn``: same constructors, parameters and ``state_dict``; our kernels inside.

Besides, the few layers of a deep-learning course that torch lacks: DropConnect, maxout, stochastic depth.
"""

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
    "Linear",
    "LinearCrossEntropyLoss",
    "Maxout",
    "MultiheadAttention",
    "Sequential",
    "StochasticDepth",
    "norm_activation",
]
