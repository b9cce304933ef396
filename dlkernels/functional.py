"""The operations, with the signatures of ``torch.nn.functional``."""

from .ops.attention import scaled_dot_product_attention
from .ops.cross_entropy import cross_entropy

__all__ = ["cross_entropy", "scaled_dot_product_attention"]
