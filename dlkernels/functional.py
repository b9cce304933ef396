"""The operations, with the signatures of ``torch.nn.functional``."""

from .ops.batch_norm import batch_norm
from .ops.cross_entropy import cross_entropy
from .ops.lstm import lstm, lstm_cell

__all__ = ["batch_norm", "cross_entropy", "lstm", "lstm_cell"]
