"""The 1,797 scans of handwritten digits, 8 x 8 pixels, that ship with scikit-learn (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .sets import TEST_SHARE, ClassifiedImages, Columns, classified_images, split_off

NUM_CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images ``[N, C, H, W]`` (float32, normalised over the training set) and their classes ``[N]``, in two parts."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int


def load_digits(seed: int = 0, test_share: float = TEST_SHARE) -> Split:
    """The digits for who writes their own loop: all at once, normalised, without a validation part.

    Args:
        seed: decides which examples are held out for testing.
        test_share: how many of them, in (0, 1).

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        ValueError: ``test_share`` is outside (0, 1).
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be between 0 and 1, got {test_share}")
    (images, labels), (test_images, test_labels) = split_off(read_digits(), test_share, seed)
    mean, deviation = images.mean(), images.std()
    images, test_images = (images - mean) / deviation, (test_images - mean) / deviation
    return Split(images, labels, test_images, test_labels, NUM_CLASSES)


def shuffled_batches(
    images: Tensor, labels: Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the examples in random order. What does not fill a last batch is left for another epoch's order."""
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
        yield images[chosen], labels[chosen]


def digit_images(seed: int = 0) -> ClassifiedImages:
    """The digits in three parts; ``seed`` draws them. The test examples are those of :func:`load_digits`.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    train, test = split_off(read_digits(), TEST_SHARE, seed)
    return classified_images(train, test, NUM_CLASSES, seed)


def read_digits() -> Columns:
    """All images, float32 ``[1797, 1, 8, 8]`` in [0, 1], and labels, int64 ``[1797]``."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target).long()
