"""What the recipe is run on, and how one training run on it goes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

Examples = tuple[Tensor, Tensor]  # images [N, C, H, W] and classes, int64 [N]
OptimizerMaker = Callable[[Iterable[torch.nn.Parameter], float, float], torch.optim.Optimizer]


def adamw(parameters: Iterable[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser of a problem that names none."""
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)


@dataclass(frozen=True)
class Problem:
    """A network and what it is to learn.

    Args:
        build: makes a fresh network; torch's generator is seeded before each call.
        loss: of what the network returns and the classes: a mean over the batch, without regularisation.
        train, validation: images ``[N, C, H, W]`` and classes, int64 ``[N]``.
        num_classes: classes to tell apart.
        batch_size: examples in a step.
        optimizer: makes the optimiser, of parameters, learning rate and weight decay.
        seed: of initial values, orders and dropout.

    Raises:
        ValueError: there are fewer than two classes, fewer than two examples in a batch or fewer training examples than
            that, images that are not finite, or labels that do not fit.
    """

    build: Callable[[], torch.nn.Module]
    loss: Callable[[Any, Tensor], Tensor]
    train: Examples
    validation: Examples
    num_classes: int
    batch_size: int = 32
    optimizer: OptimizerMaker = adamw
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            _check_examples(name, getattr(self, name), self.num_classes)
        present = self.train[1].unique().tolist()
        if len(present) < 2:
            raise ValueError(f"train must have at least two classes, got only {present}")
        count = len(self.train[1])
        if not 2 <= self.batch_size <= count:
            raise ValueError(f"batch_size must be between 2 and the {count} training examples, got {self.batch_size}")

    @property
    def chance_loss(self) -> float:
        """The cross-entropy of who knows nothing, log C."""
        return math.log(self.num_classes)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training examples."""
        return len(self.train[1]) // self.batch_size

    def fresh_network(self) -> torch.nn.Module:
        """The network as every run starts with it, in training mode."""
        with self.seeded():
            return self.build().train()

    def batches(self) -> Iterator[Examples]:
        """Training batches without end, in another order in each epoch."""
        images, labels = self.train
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order.split(self.batch_size)[: self.steps_per_epoch]:
                yield images[chosen], labels[chosen]

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draws the problem's random numbers; the caller's generator is left as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            yield

    def checksum(self) -> str:
        """Of the examples and the network's initial values."""
        tensors = [*self.train, *self.validation, *self.fresh_network().state_dict().values()]
        checksum = 0
        for tensor in tensors:
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), checksum)
        return f"{checksum:08x}"


def _check_examples(name: str, examples: Examples, num_classes: int) -> None:
    images, labels = examples
    if labels.dtype != torch.int64 or labels.dim() != 1 or not len(images) == len(labels) > 0:
        got = f"{len(images)} images and {labels.dtype} {list(labels.shape)}"
        raise ValueError(f"{name} must be images and as many int64 labels, got {got}")
    if not images.isfinite().all():
        raise ValueError(f"{name} must have finite images, got {int((~images.isfinite()).sum())} values that are not")
    if labels.min() < 0 or labels.max() >= num_classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{name} must have labels in [0, {num_classes}), got {got}")


@dataclass
class Curves:
    """How a training run went."""

    losses: list[float] = field(default_factory=list)  # of the batch of each step
    accuracies: list[float] = field(default_factory=list)  # likewise
    train_loss: list[float] = field(default_factory=list)  # of each epoch, the mean over its steps
    train_accuracy: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)  # after each epoch
    validation_accuracy: list[float] = field(default_factory=list)

    @property
    def last_loss(self) -> float:
        """Mean over the last ten steps."""
        return mean(self.losses[-10:])

    @property
    def diverged(self) -> bool:
        """Whether the loss is no number any more, or has grown by half."""
        return not self.last_loss <= 1.5 * abs(self.losses[0])

    @property
    def final_accuracy(self) -> float:
        """On the validation examples after the last epoch; 0 if the run diverged."""
        return 0.0 if self.diverged else self.validation_accuracy[-1]


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def logits_of(output: Any) -> Tensor:
    """The logits of a network that may return auxiliary ones after them."""
    return output if isinstance(output, Tensor) else output[0]


def accuracy(output: Any, labels: Tensor) -> float:
    """Share of the labels that have the largest logit."""
    return (logits_of(output).argmax(1) == labels).double().mean().item()


def take_steps(
    problem: Problem,
    model: torch.nn.Module,
    batches: Iterable[Examples],
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Iterator[tuple[float, float]]:
    """Takes a step on each batch; its loss and accuracy before that. Ends at a loss that is not finite."""
    optimizer = problem.optimizer([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay)
    for images, labels in batches:
        output = model(images)
        loss = problem.loss(output, labels)
        value = loss.item()
        if math.isfinite(value) and loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield value, accuracy(output, labels)
        if not math.isfinite(value):
            return


@torch.no_grad()
def validate(problem: Problem, model: torch.nn.Module) -> tuple[float, float]:
    """Loss and accuracy on the validation examples, of a network in training mode."""
    images, labels = problem.validation
    model.eval()
    logits = torch.cat([logits_of(model(part)) for part in images.split(256)])
    model.train()
    return problem.loss(logits, labels).item(), accuracy(logits, labels)


def fit(problem: Problem, epochs: int, learning_rate: float, weight_decay: float) -> Curves:
    """Trains a fresh network. The curves end where the loss is no longer finite."""
    curves, size = Curves(), problem.steps_per_epoch
    model = problem.fresh_network()
    with problem.seeded():
        batches = islice(problem.batches(), epochs * size)
        for step, (loss, right) in enumerate(take_steps(problem, model, batches, learning_rate, weight_decay), 1):
            curves.losses.append(loss)
            curves.accuracies.append(right)
            if step % size == 0 and math.isfinite(loss):
                curves.train_loss.append(mean(curves.losses[-size:]))
                curves.train_accuracy.append(mean(curves.accuracies[-size:]))
                validation_loss, validation_accuracy = validate(problem, model)
                curves.validation_loss.append(validation_loss)
                curves.validation_accuracy.append(validation_accuracy)
    return curves
