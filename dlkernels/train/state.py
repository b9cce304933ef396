"""What a checkpoint says of a run, checked before a trainer takes it on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import typed_json
from .optimizers import optimizer_tensors


@dataclass(frozen=True, kw_only=True)
class State:
    """The facts of :meth:`dlkernels.train.Trainer.state`.

    Raises:
        ValueError: a value is none that a run can have; the message names it.
    """

    step: int
    seconds: float
    schedule: dict[str, float]
    best_loss: float
    best_step: int
    generators: list[str]
    data: int

    def __post_init__(self) -> None:
        _check(self.step >= 0, "step", self.step, "not negative")
        _check(0 <= self.seconds < math.inf, "seconds", self.seconds, "finite and not negative")
        _check(0 <= self.best_step <= self.step, "best_step", self.best_step, f"in 0 to {self.step}")
        _check(not math.isnan(self.best_loss), "best_loss", self.best_loss, "a number")

    @classmethod
    def from_json(cls, facts: Any) -> State:
        """The state that ``facts`` describes.

        Raises:
            ValueError: a fact is missing, unknown, or of another type.
        """
        return typed_json.as_dataclass(cls, facts, "state")


def expected_memory(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors with the names, shapes and types that :func:`optimizer_tensors` has after a step, of any value."""
    groups = [
        {**group, "params": [torch.zeros_like(weight, device="meta") for weight in group["params"]]}
        for group in optimizer.param_groups
    ]
    for group in groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    like = type(optimizer)(groups)  # type: ignore[call-arg]  # the groups have all that the defaults are for
    like.step()
    return optimizer_tensors(like)


def check_memory(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, steps: int) -> None:
    """Checks what an optimiser is to remember, ``tensors``, against :func:`expected_memory`.

    A weight that had no gradient yet has no memory; one that has any has all.

    Raises:
        ValueError: an entry is missing, too much, of another shape or type, not a number, or counts other steps than a
            run of ``steps`` can have taken; the message names it, with ``what`` before its name.
    """
    seen = {name.partition(".")[0] for name in tensors}
    whole = {name: tensor for name, tensor in expected.items() if name.partition(".")[0] in seen}
    check_like(tensors, whole or expected, what)
    for name, tensor in tensors.items():
        if name.endswith(".step") and not 1 <= tensor.item() <= steps:
            raise ValueError(f"'{what}.{name}' must be in 1 to {steps}, got {tensor.item()}")


def check_like(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Checks that ``tensors`` could be ``expected`` at another step.

    Raises:
        ValueError: an entry is missing, too much, of another shape or type, or not a number; the message names it, with
            ``what`` before its name.
    """
    for name in (*expected, *tensors):
        if (name in expected) != (name in tensors):
            raise ValueError(f"'{what}.{name}' is {'missing' if name in expected else 'nothing that this run has'}")
        found, like = tensors[name], expected[name]
        for fact in ("shape", "dtype"):
            own, needed = getattr(found, fact), getattr(like, fact)
            if own != needed:
                own, needed = (list(own), list(needed)) if fact == "shape" else (own, needed)
                raise ValueError(f"'{what}.{name}' has {fact} {own}, this run needs {needed}")
        if found.is_floating_point() and found.isnan().any():
            raise ValueError(f"'{what}.{name}' has elements that are not a number")


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
