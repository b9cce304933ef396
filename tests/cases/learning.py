"""Short training runs, for the checks that a network learns what its lecture says it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dlkernels.data import shuffled_batches


def fit(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 32,
) -> list[float]:
    """Lowers ``loss(images, labels)`` by AdamW, whose rate falls to zero on a cosine; returns the loss of each step."""
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-2)
    steps = epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(epochs):
        for batch in shuffled_batches(images, labels, batch_size, generator):
            value = loss(*batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.item())
    return losses


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit in evaluation is that of their class."""
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()
