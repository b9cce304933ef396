"""What a network's builder can be given: its parameters, their types, and values for them from text."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..models.registry import Builder

Value = bool | int | float | str | None
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def network_class(builder: Builder) -> type[torch.nn.Module]:
    """The class that ``builder`` is, or that it says it returns."""
    return builder if isinstance(builder, type) else typing.get_type_hints(builder)["return"]


def parameters(builder: Builder) -> dict[str, Any]:
    """The names that ``builder`` takes, with their types; where it passes the rest on, also what its class takes."""
    if isinstance(builder, type):
        return _named(builder.__init__)  # type: ignore[misc]
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(builder).parameters.values())
    return {**(parameters(network_class(builder)) if passes_on else {}), **_named(builder)}


def required(builder: Builder) -> list[str]:
    """Those of its own parameters that ``builder`` has no default for."""
    found = inspect.signature(builder).parameters.values()
    return [p.name for p in found if p.default is p.empty and p.kind in BY_NAME]


def chosen(builder: Builder, texts: Iterable[str]) -> dict[str, Value]:
    """Arguments for ``builder`` from texts like ``"dropout=0.1"``, each of its parameter's type.

    Raises:
        ValueError: there is no such parameter, it takes nothing that a text can give, or the value is not of its type.
    """
    simple = {name: options for name, hint in parameters(builder).items() if (options := _simple(hint))}
    found: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in simple:
            known = ", ".join(f"{name} ({_describe(options)})" for name, options in simple.items())
            raise ValueError(f"expected NAME=VALUE of {known}; got {text!r}")
        found[name] = _parsed(name, value, simple[name])
    return found


def check(builder: Builder, arguments: Mapping[str, Value]) -> None:
    """Checks arguments that :func:`chosen` may have given.

    Raises:
        ValueError: there is no such parameter, or it takes no value of this type.
    """
    hints = parameters(builder)
    for name, value in arguments.items():
        options = _simple(hints.get(name))
        if type(value) not in options and not (type(value) is int and float in options):
            expected = _describe(options) if options else "left out: there is no such argument"
            raise ValueError(f"arguments: {name} must be {expected}, got {value!r}")


def _named(function: Callable[..., Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(function)
    found = inspect.signature(function).parameters.values()
    return {p.name: hints.get(p.name) for p in found if p.kind in BY_NAME and p.name != "self"}


def _simple(hint: Any) -> list[type]:
    """Those types of ``hint`` that a text can give; none if that is nothing but None."""
    united = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = [
        o for o in (typing.get_args(hint) if united else (hint,)) if o in (bool, int, float, str, types.NoneType)
    ]
    return [] if options == [types.NoneType] else options


def _describe(options: list[type]) -> str:
    return " or ".join("none" if option is types.NoneType else option.__name__ for option in options)


def _parsed(name: str, text: str, options: list[type]) -> Value:
    if types.NoneType in options and text == "none":
        return None
    if bool in options and text in ("true", "false"):
        return text == "true"
    for kind in (int, float, str):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                continue
    truth = ": true or false" if bool in options else ""
    raise ValueError(f"{name} must be {_describe(options)}{truth}, got {text!r}")
