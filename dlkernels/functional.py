"""The operations, with the signatures of ``torch.nn.functional``."""

from .ops.attention import scaled_dot_product_attention
from .ops.batch_norm import batch_norm
from .ops.conv2d import conv2d
from .ops.cross_entropy import cross_entropy
from .ops.linear import linear
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.lstm import lstm, lstm_cell

__all__ = [
    "batch_norm",
    "conv2d",
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "scaled_dot_product_attention",
]
