"""What a training run depends on besides the data and the network, and what it tells after each step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .optimizers import OPTIMIZERS, SCHEDULES


class TrainingError(Exception):
    """Training cannot go on; the message says why and where."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train.

    Raises:
        ValueError: a value is outside its range; the message names it.
    """

    epochs: int = 20
    batch_size: int = 32  # examples in a step, over all ranks
    accumulate: int = 1  # parts that a rank computes its share of a batch in, one after the other
    optimizer: str = "nesterov"
    learning_rate: float = 0.05  # its peak
    scale_rate: int | None = None  # batch size that learning_rate is for; the peak grows with batch_size
    momentum: float = 0.9  # of momentum and nesterov; the first beta of adam and adamw
    weight_decay: float = 5e-3  # of matrices and filters
    schedule: str = "cosine"
    warmup: float = 0.1  # share of all steps in which the learning rate rises to its peak
    label_smoothing: float = 0.0  # of classifiers
    mixup: float | None = None  # of classifiers: alpha of the distribution of the weight
    cutmix: float | None = None  # of classifiers: alpha of the distribution of the share that is kept
    cutout: int | None = None  # of classifiers: height and width of the hole
    clip_norm: float | None = None  # longest gradient, over all weights of one optimiser
    ema: float | None = None  # decay of the moving average of the weights, which is evaluated in their place
    patience: int | None = None  # epochs without a smaller validation loss before the run stops; the best weights stay
    amp: bool = False  # autocast to bfloat16
    seed: int = 0  # of weights, order, dropout, and the examples set aside

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("momentum", "warmup", "label_smoothing"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("mixup", "cutmix", "clip_norm"):
            value = getattr(self, name)
            _check(value is None or _positive(value), name, value, "a positive number")
        for name in ("scale_rate", "cutout", "patience"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        _check(_positive(self.learning_rate), "learning_rate", self.learning_rate, "a positive number")
        _check(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "a number that is not negative")
        _check(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "in (0, 1)")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "at least 0, and of 63 bits")
        _check(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        _check(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")

    @property
    def peak_rate(self) -> float:
        """The learning rate after warm-up, by the linear scaling rule (Goyal et al. 2017) where that is asked for."""
        return self.learning_rate * (1 if self.scale_rate is None else self.batch_size / self.scale_rate)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of training."""

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    epochs: int
    losses: dict[str, float]  # of this batch before the step, by what is minimised: "loss", or a GAN's two
    learning_rate: float
    seconds: float  # since the start, without the time spent on validation
    examples: int  # seen since the start
    validation: dict[str, float] = field(default_factory=dict)  # after the last step of an epoch


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
