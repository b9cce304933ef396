"""Values from JSON that somebody else may have written, checked against types before anything is done with them."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

Kind = TypeVar("Kind")

WORDS = {bool: "true or false", int: "an integer of 64 bits", float: "a number", str: "a printable text"}


def parse(text: str | bytes) -> Any:
    """What a text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def as_dataclass(kind: type[Kind], facts: Any, name: str, complete: bool = True) -> Kind:
    """The ``kind`` whose fields ``facts`` gives.

    Args:
        name: of ``facts``, for messages.
        complete: whether fields that have a default must be there too.

    Raises:
        ValueError: a field is missing, unknown or of another type, or ``kind`` refuses a value; the message names it.
    """
    checked(facts, dict, name)
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    known = {field.name for field in fields if field.init}
    for key in facts:
        if key not in known:
            raise ValueError(f"{name} has {brief(key)}, which is unknown here")
    for field in fields:
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if field.name in known and field.name not in facts and (complete or not has_default):
            raise ValueError(f"{name} has no {field.name!r}")
    values = {key: checked(value, hints[key], f"{name}.{key}", complete) for key, value in facts.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def checked(value: Any, hint: Any, name: str, complete: bool = True) -> Any:
    """``value`` if it is what the type ``hint`` says; a dataclass is made of its fields, as by :func:`as_dataclass`.

    Raises:
        ValueError: it is something else; the message names it.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return as_dataclass(typing.cast(type, hint), value, name, complete)
    if origin in (typing.Union, types.UnionType):
        found = [option for option in inner if _is(value, option)]
        return checked(value, found[0] if found else inner[0], name, complete)
    container = dict if origin is not None and issubclass(origin, Mapping) else origin or hint
    if not _is(value, container):
        words = {**WORDS, types.NoneType: "null", dict: "an object", list: "a list"}[container]
        raise ValueError(f"{name} must be {words}, got {brief(value)}")
    if container is dict and inner:
        return {key: checked(entry, inner[1], f"{name}.{key:.60}", complete) for key, entry in value.items()}
    if container is list and inner:
        return [checked(entry, inner[0], f"{name}[{number}]", complete) for number, entry in enumerate(value)]
    return float(value) if container is float else value


def brief(value: Any) -> str:
    """A value for an error message, not at any length."""
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain type; truth is no number, and integers are numbers as far as floats reach."""
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is str:
        return type(value) is str and value.isprintable()
    return type(value) is kind
