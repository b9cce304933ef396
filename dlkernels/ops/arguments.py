"""Errors for arguments of a kind that has no meaning, which name the operation and the argument."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
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


def named(error: TypeError, binding: Any, names: str, values: tuple[Any, ...]) -> TypeError:
    """The error of a call of ``binding``, with the first argument that it has no place for; as it is where all fit.

    Names and values are in the order of the binding's.
    """
    kinds = re.findall(r"\w+: ([^,]+)(?=, \w+: |\) ->)", binding.__doc__)
    for kind, (name, value) in zip(kinds, zip(names.split(), values, strict=True), strict=True):
        if not any(_KINDS.get(part, _unknown)(value) for part in kind.split(" | ")):
            got = str(value) if type(value) is int and "int" in kind else type(value).__name__
            return TypeError(f"{binding.__name__}: {name} must be {_readable(kind)}, got {got}")
    return error


def _is_whole(value: Any) -> bool:
    """Whether the bindings take ``value`` as an int: no bool, nothing that would be cut, 64 bits at most."""
    if isinstance(value, bool):
        return False
    try:
        return -(2**63) <= operator.index(value) < 2**63
    except Exception:
        return False


def _is_real(value: Any) -> bool:
    try:
        float(value)
    except Exception:
        return False
    return not isinstance(value, (str, bytes, bytearray))


def _unknown(value: Any) -> bool:
    return True


# What the signatures of bindings call the kinds of an argument; versions of pybind11 differ.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "torch.Tensor": lambda value: isinstance(value, Tensor),
    "bool": lambda value: isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"),
    "str": lambda value: isinstance(value, str),
    "int": _is_whole,
    "Sequence[int]": lambda value: isinstance(value, (tuple, list)) and all(map(_is_whole, value)),
    "float": _is_real,
    "typing.SupportsFloat": _is_real,
    "typing.SupportsIndex": _is_real,
}


def _readable(kind: str) -> str:
    words = kind.replace("typing.SupportsFloat | typing.SupportsIndex", "a float").replace("torch.Tensor", "a Tensor")
    words = words.replace("Sequence[int]", "a sequence of them").replace("str", "a str").replace("bool", "a bool")
    return " or ".join(re.sub(r"^int$", "an int of 64 bits", word) for word in words.split(" | "))
