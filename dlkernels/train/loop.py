"""The training loop: mini-batches, a loss, an optimiser, a learning-rate schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Split, shuffled_batches


class TrainingError(Exception):
    """Training cannot go on; the message says why and where."""


@dataclass(frozen=True)
class Settings:
    """What a training run depends on, besides the data and the model."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str = "sgd"
    weight_decay: float = 5e-3
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """One step of training. ``test_accuracy`` is measured after the last step of each epoch."""

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    epochs: int
    loss: float
    accuracy: float  # of this mini-batch, before the step
    learning_rate: float
    seconds: float  # since the start, without the time spent on testing
    examples: int  # seen since the start
    test_accuracy: float | None = None


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; weight decay on matrices and filters only, not on biases and norms."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {settings.optimizer!r}")


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up over the first tenth, then half a cosine to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """Share of the images whose largest logit is that of their class."""
    model.eval()
    right = 0
    for image, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(image).argmax(1) == label).sum())
    model.train()
    return right / len(labels)


def train(
    model: torch.nn.Module, loss_function: torch.nn.Module, data: Split, settings: Settings
) -> Iterator[Progress]:
    """Trains ``model`` in place, one mini-batch for each item drawn from the iterator.

    The same model, data and settings give the same numbers every time: the order of the examples comes from the seed.

    Raises:
        TrainingError: a batch is larger than the training set, or the loss is no longer finite.
    """
    examples = len(data.train_labels)
    if settings.batch_size > examples:
        raise TrainingError(f"the batch size, {settings.batch_size}, is larger than the training set, {examples}")
    optimizer = make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    steps_per_epoch = examples // settings.batch_size
    steps = settings.epochs * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))

    model.train()
    step, seconds = 0, 0.0
    for epoch in range(1, settings.epochs + 1):
        for images, labels in shuffled_batches(data.train_images, data.train_labels, settings.batch_size, generator):
            start = time.perf_counter()
            learning_rate = float(scheduler.get_last_lr()[0])
            logits = model(images)  # [N, classes]
            loss = loss_function(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            accuracy = (logits.argmax(1) == labels).float().mean().item()
            seconds += time.perf_counter() - start
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss became {loss.item()} at step {step}; try a smaller learning rate")
            last = step % steps_per_epoch == 0
            yield Progress(
                step=step,
                steps=steps,
                epoch=epoch,
                epochs=settings.epochs,
                loss=loss.item(),
                accuracy=accuracy,
                learning_rate=learning_rate,
                seconds=seconds,
                examples=step * settings.batch_size,
                test_accuracy=evaluate(model, data.test_images, data.test_labels) if last else None,
            )
