"""Data sets as tensors, split into training and test examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]`` (float32, normalised over the training set) and their classes ``[N]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int


def load_digits(seed: int = 0, test_share: float = 0.2) -> Split:
    """The 1,797 scans of handwritten digits, 8 x 8 pixels, that ship with scikit-learn (Alpaydin & Kaynak 1998).

    Args:
        seed: decides which examples are held out for testing.
        test_share: how many of them, in (0, 1).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: ``test_share`` is outside (0, 1).
    """
    from sklearn import datasets

    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}")
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)  # [1797, 1, 8, 8], 0 to 16
    labels = torch.from_numpy(digits.target).long()  # [1797]

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(test_share * len(labels))])
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Split(images[train], labels[train], images[test], labels[test], num_classes=10)


def shuffled_batches(
    images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the examples in random order. What does not fill a last batch is left for another epoch's order."""
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
        yield images[chosen], labels[chosen]
