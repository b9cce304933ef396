"""The operations, with the signatures of ``torch.nn.functional``."""

from .ops.cross_entropy import cross_entropy

__all__ = ["cross_entropy"]
