"""The states of all generators of random numbers, as text that a checkpoint can hold."""

from __future__ import annotations

import base64
import json
import random
from typing import cast

import numpy as np
import torch


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
    """Puts the generators where :func:`states` found them."""
    found = json.loads(text)
    version, words, gauss = found["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(found["numpy"]))
    torch.set_rng_state(_tensor(found["torch"]))
    if found["cuda"] is not None:
        torch.cuda.set_rng_state(_tensor(found["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
