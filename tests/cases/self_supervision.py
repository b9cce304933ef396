"""Digits without labels: encoders, random views, short training runs, and what features are worth with few labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlkernels import nn, ssl
from dlkernels.data import Split, load_digits, shuffled_batches
from dlkernels.models.blocks import conv_norm_activation

FEATURES = 64


@functools.cache
def digits() -> Split:
    pytest.importorskip("sklearn")
    return load_digits(0)


def conv_encoder(in_channels: int = 1, width: int = 32) -> torch.nn.Sequential:
    """Three convolutions with batch norm, averaged over the image: any size to ``[N, 2 * width]``."""
    conv = partial(conv_norm_activation, activation=torch.nn.ReLU, norm_layer=nn.BatchNorm2d, layers=nn)
    return torch.nn.Sequential(
        conv(in_channels, width),
        conv(width, 2 * width, stride=2),
        conv(2 * width, 2 * width),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )


def linear_encoder(features: int) -> torch.nn.Sequential:
    """One linear layer over 12 pixels."""
    return torch.nn.Sequential(torch.nn.Flatten(), nn.Linear(12, features))


def warped(images: Tensor) -> Tensor:
    """Images turned, sheared, scaled and shifted a little, each by itself."""
    turn = torch.eye(2) + 0.2 * torch.randn(len(images), 2, 2)
    shift = 0.5 * torch.rand(len(images), 2, 1) - 0.25
    grid = F.affine_grid(torch.cat([turn, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Constant(torch.nn.Module):
    """The same features for everything: what collapsed."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), -1)


def pretrain(
    loss: Callable[[Tensor], Tensor],
    parameters: Iterator[torch.nn.Parameter],
    epochs: int,
    learning_rate: float = 5e-3,
    batch_size: int = 128,
    update: Callable[[], None] = lambda: None,
) -> None:
    """Lowers ``loss(images)`` on the training digits by AdamW, whose rate falls to zero on a cosine."""
    split = digits()
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], learning_rate, weight_decay=1e-2)
    steps = epochs * (len(split.train_labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for images, _ in shuffled_batches(split.train_images, split.train_labels, batch_size, order):
            value = loss(images)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            update()


def probe(encoder: torch.nn.Module) -> float:
    """Test accuracy of a linear probe with 10 labels of each class, averaged over five draws of the labels."""
    split = digits()
    known, unknown = (ssl.features_of(encoder, images) for images in (split.train_images, split.test_images))
    right = 0.0
    for seed in range(5):
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[split.train_labels[order] == label][:10] for label in range(10)])
        classes = ssl.linear_probe(known[chosen], split.train_labels[chosen], unknown)
        right += (classes == split.test_labels).float().mean().item() / 5
    return right


class Outputs(TorchDispatchMode):
    """Counts the elements of what operators return, forward and backward: ``sizes``, in any order.

    Views, and results that lie where an argument does, do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.sizes.append(x.numel())
        return results

    def blocks(self, elements: int) -> int:
        """How many results have so many elements or more."""
        return sum(size >= elements for size in self.sizes)
