"""The states of all generators of random numbers, as text that a checkpoint can hold."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from .. import typed_json


def seed_all(seed: int, rank: int) -> None:
    """Seeds Python's, numpy's and torch's generators, differently in every process and for every seed."""
    own, numpy_seed, torch_seed = (int(word) for word in np.random.SeedSequence([seed, rank]).generate_state(3))
    random.seed(own)
    np.random.seed(numpy_seed)
    torch.manual_seed(torch_seed)


def states() -> str:
    """Where the generators of this process stand."""
    version, words, gauss = random.getstate()
    name, keys, *position = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    found = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), *position],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }
    return json.dumps(found)


def restore(text: str) -> None:
    """Puts the generators where :func:`states` found them.

    Raises:
        ValueError: no generator can stand there; the message names it.
    """
    try:
        found = typed_json.checked(typed_json.parse(text), dict, "it")
    except ValueError as error:
        raise ValueError(f"the state of the generators cannot be used: {error}") from None
    setters: dict[str, Callable[[Any], None]] = {
        "python": _set_python,
        "numpy": _set_numpy,
        "torch": lambda state: torch.set_rng_state(_tensor(state)),
        "cuda": lambda state: None if state is None else torch.cuda.set_rng_state(_tensor(state)),
    }
    for name, set_state in setters.items():
        try:
            set_state(found[name])
        except (ArithmeticError, AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the state of {name}'s generator cannot be used: {error}") from None


def _set_python(state: Any) -> None:
    version, words, gauss = state
    random.setstate((version, tuple(words), None if gauss is None else float(gauss)))


def _set_numpy(state: Any) -> None:
    name, keys, position, has_gauss, gauss = state
    # numpy reads whatever lies at the position, which may be outside its words.
    if type(position) is not int or not 0 <= position <= len(keys):
        raise ValueError(f"its position must be in 0 to {len(keys)}, got {position}")
    np.random.set_state((name, np.array(keys, np.uint32), position, int(has_gauss), float(gauss)))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
