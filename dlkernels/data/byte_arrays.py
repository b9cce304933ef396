"""Reads pickles of byte arrays and builtin containers without running anything that a pickle asks for.

A pickle is a program: it may name any function and call it. The reader below lets numpy's array and its type be named,
and even these it does not call: classes of its own stand in for them, which keep bytes and check sizes. So neither
foreign code nor numpy's own unpickling sees what the file holds.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from .files import DataError, content_of


class _Type:
    """Stands for ``numpy.dtype``: only unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError(f"an array has elements of type {code!r}, expected bytes ('u1')")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment mean nothing for bytes."""


class _Array:
    """Stands for ``numpy.ndarray``: a shape and bytes."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, element, column_major, content = state
        if not isinstance(element, _Type) or not isinstance(content, bytes):
            raise ValueError("an array is not one of bytes")
        if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) != len(content):
            raise ValueError(f"an array of shape {shape} has {len(content)} bytes")
        array = np.frombuffer(content, np.uint8)
        self.array = array.reshape(shape, order="F" if column_major else "C")


def _reconstruct(*_: object) -> _Array:
    """Stands for numpy's function that makes the empty array, whose shape and bytes then follow."""
    return _Array()


ALLOWED = {
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return ALLOWED[module, name]


def read_pickle(path: Path) -> dict[bytes, Any]:
    """The dictionary that ``path`` holds, whose arrays are uint8 arrays of numpy; text of Python 2 becomes bytes.

    Raises:
        DataError: the file holds anything else, is truncated or too long; the message gives the offset.
    """
    file = io.BytesIO(content_of(path))
    try:
        content = _Unpickler(file, encoding="bytes").load()
    except Exception as error:  # a pickle can raise anything
        raise DataError(path, f"this pickle cannot be read: {error}", offset=file.tell()) from None
    end = file.tell()
    if file.read(1):
        raise DataError(path, "the pickle ends here, and the file goes on", offset=end)
    if not isinstance(content, dict):
        raise DataError(path, f"expected a dictionary, got {type(content).__name__}")
    return {key: value.array if isinstance(value, _Array) else value for key, value in content.items()}
