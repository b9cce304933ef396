"""The operations, with the signatures of ``torch.nn.functional``."""

from .ops.cross_entropy import cross_entropy
from .ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
