"""Optimisers and learning-rate schedules by name.

The optimisers are torch's. The schedules give a factor of the peak learning rate; they are functions of the step alone,
so that a run can go on at any step, but for ``plateau``, which watches the validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .settings import Settings

Groups = list[dict[str, Any]]

# Weight decay is part of the gradient (L2) in all but adamw, which shrinks the weights apart from it.
OPTIMIZERS: dict[str, Callable[[Groups, Settings], torch.optim.Optimizer]] = {
    "sgd": lambda groups, settings: torch.optim.SGD(groups, settings.learning_rate),
    "momentum": lambda groups, settings: torch.optim.SGD(groups, settings.learning_rate, settings.momentum),
    "nesterov": lambda groups, settings: torch.optim.SGD(
        groups, settings.learning_rate, settings.momentum, nesterov=True
    ),
    "adagrad": lambda groups, settings: torch.optim.Adagrad(groups, settings.learning_rate),
    "rmsprop": lambda groups, settings: torch.optim.RMSprop(groups, settings.learning_rate),
    "adam": lambda groups, settings: torch.optim.Adam(groups, settings.learning_rate, (settings.momentum, 0.999)),
    "adamw": lambda groups, settings: torch.optim.AdamW(groups, settings.learning_rate, (settings.momentum, 0.999)),
}


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """The optimiser that ``settings`` names. Weights decay in matrices and filters, not in biases and norms."""
    parameters = list(parameters)
    groups: Groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[settings.optimizer]([group for group in groups if group["params"]], settings)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of the steps so far, by the number of the weight and the name of what it is."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Gives an optimiser what :func:`optimizer_tensors` took from its like."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# The factor after warm-up: of the step from 0, the number of all steps, and the number of those that warm up.
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": lambda step, steps, warmup: 1.0,
    "step": lambda step, steps, warmup: 0.1 ** (3 * step // steps),  # a tenth after each third
    "cosine": lambda step, steps, warmup: 0.5 * (1 + math.cos(math.pi * share_after(step, steps, warmup))),
    "linear": lambda step, steps, warmup: 1 - share_after(step, steps, warmup),
    "inverse_sqrt": lambda step, steps, warmup: math.sqrt(max(1, warmup) / (step + 1)),
    "plateau": lambda step, steps, warmup: 1.0,
}


def share_after(step: int, steps: int, warmup: int) -> float:
    """How much of the run after the warm-up is over, from 0 at its first step towards 1."""
    return (step - warmup) / max(1, steps - warmup)


class Schedule:
    """The factor of the learning rate: it rises to 1 in equal parts while warming up, then follows the named function.

    ``plateau`` then divides it by ten each time that the validation loss has not become smaller for three epochs.
    """

    PATIENCE = 3

    def __init__(self, name: str, steps: int, warmup: float) -> None:
        self.name = name
        self.steps = steps
        self.warmup = int(warmup * steps)
        self.reduction = 1.0
        self.smallest = math.inf
        self.waited = 0

    def factor(self, step: int) -> float:
        """For a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.reduction * SCHEDULES[self.name](step, self.steps, self.warmup)

    def observe(self, loss: float) -> None:
        """A validation loss, after an epoch."""
        if loss < self.smallest:
            self.smallest, self.waited = loss, 0
            return
        self.waited += 1
        if self.name == "plateau" and self.waited >= self.PATIENCE:
            self.reduction /= 10
            self.waited = 0

    def state(self) -> dict[str, float]:
        """What :meth:`observe` has changed, for a checkpoint."""
        return {"reduction": self.reduction, "smallest": self.smallest, "waited": self.waited}

    def load(self, state: dict[str, float]) -> None:
        """Takes on a state of :meth:`state`.

        Raises:
            ValueError: it is none.
        """
        if state.keys() != self.state().keys():
            raise ValueError(f"schedule must have {', '.join(self.state())}, got {', '.join(state) or 'nothing'}")
        if not (0 <= state["reduction"] <= 1 and -math.inf <= state["smallest"] and 0 <= state["waited"] < math.inf):
            raise ValueError(f"schedule has values that no run comes to: {state}")
        self.reduction, self.smallest, self.waited = state["reduction"], state["smallest"], int(state["waited"])
