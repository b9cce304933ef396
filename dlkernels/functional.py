"""The operations, with the signatures of ``torch.nn.functional``."""

from .ops.conv2d import conv2d
from .ops.cross_entropy import cross_entropy

__all__ = ["conv2d", "cross_entropy"]
