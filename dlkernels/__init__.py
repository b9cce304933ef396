"""Hand-written convolution, batch norm, LSTM, cross-entropy and attention for PyTorch."""

from . import _extension

__version__ = "0.1.0"

_extension.load()  # first: what follows calls it

from . import _C, functional, nn  # noqa: E402
from .convert import convert, report, revert  # noqa: E402
from .fuse import fuse  # noqa: E402
from .override import override  # noqa: E402

__all__ = ["_C", "convert", "functional", "fuse", "nn", "override", "report", "revert"]
