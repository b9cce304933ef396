"""Errors for arguments of a kind that has no meaning, which name the operation and the argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_tensors(operation: str, **arguments: Any) -> None:
    """Raises TypeError unless all are tensors."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operation}: {name} must be a Tensor, got {type(value).__name__}")


def check_sequence_of_tensors(operation: str, name: str, values: Any) -> None:
    """Raises TypeError unless ``values`` is a tuple or list of tensors, or a tensor that can be taken apart."""
    if not isinstance(values, (tuple, list, Tensor)):
        raise TypeError(f"{operation}: {name} must be a sequence of Tensors, got {type(values).__name__}")
    for position, value in enumerate(() if isinstance(values, Tensor) else values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{operation}: {name}[{position}] must be a Tensor, got {type(value).__name__}")


def truth(operation: str, name: str, value: Any) -> bool:
    """The truth of a flag; a TypeError names what has none."""
    try:
        return bool(value)
    except Exception as error:
        raise TypeError(f"{operation}: {name} must be a bool, got {type(value).__name__}: {error}") from None
