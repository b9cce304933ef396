"""Data sets as tensors in three parts, and how a batch of each becomes what a network takes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .vocabulary import Vocabulary

Columns = tuple[Tensor, ...]

VALIDATION_SHARE = 0.1  # of the training examples
TEST_SHARE = 0.2  # of all, where a data set does not come with test examples


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Examples in three parts: for taking steps, for watching how it goes, and for the one figure at the end.

    A part is a tuple of tensors of the same length, a row for each example.
    """

    train: Columns
    validation: Columns
    test: Columns

    def batch(self, part: Columns, rows: Tensor) -> Columns:
        """The examples ``rows`` of ``part``, as a network takes them."""
        return tuple(column[rows] for column in part)

    def checksum(self) -> int:
        """A number that changes with the training examples and their order."""
        value = 0
        for column in self.train:
            value = zlib.crc32(column.contiguous().numpy(), value)  # type: ignore[arg-type]
        return value


@dataclass(frozen=True, kw_only=True)
class Images(DataSet):
    """Images and what belongs to them. The first column holds images ``[N, C, S, S]``, uint8 or float32 in [0, 1].

    In a batch they are float32 ``[B, channels, image_size, image_size]``, with mean 0 and deviation 1 over the training
    images; the other columns stay as they are.
    """

    mean: Tensor  # [C, 1, 1], of the training images in [0, 1]
    deviation: Tensor  # [C, 1, 1]
    image_size: int
    channels: int

    def batch(self, part: Columns, rows: Tensor) -> Columns:
        images, *others = super().batch(part, rows)
        return self.prepare(images), *others

    def prepare(self, images: Tensor) -> Tensor:
        """Stored images as a network takes them."""
        images = (unit(images) - self.mean) / self.deviation
        if images.shape[-1] != self.image_size:
            images = resized(images, self.image_size)
        return images.expand(-1, self.channels, -1, -1)  # grey as equal red, green and blue


@dataclass(frozen=True, kw_only=True)
class ClassifiedImages(Images):
    """Images and their classes, int64 ``[N]`` in [0, num_classes)."""

    num_classes: int


@dataclass(frozen=True, kw_only=True)
class CaptionedImages(Images):
    """Images and captions, int64 ``[N, T]``: the start symbol, words, the end symbol, padding."""

    vocabulary: Vocabulary


@dataclass(frozen=True, kw_only=True)
class QuestionedImages(Images):
    """Images, questions, int64 ``[N, T]`` (words, padding), and answers, int64 ``[N]`` in [0, len(answers))."""

    vocabulary: Vocabulary
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SequencePairs(DataSet):
    """Sources, int64 ``[N, S]`` (symbols, padding), and targets, int64 ``[N, T]`` (start, symbols, end, padding)."""

    vocabulary: Vocabulary


@dataclass(frozen=True, kw_only=True)
class Text(DataSet):
    """Windows of a text, int32 ``[N, T + 1]``. A batch is tokens and the tokens that follow them, int64 ``[B, T]``."""

    vocabulary: Vocabulary

    def batch(self, part: Columns, rows: Tensor) -> Columns:
        windows = part[0][rows].long()  # [B, T + 1]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def unit(images: Tensor) -> Tensor:
    """Stored images in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def resized(images: Tensor, size: int) -> Tensor:
    """Float images ``[N, C, S, S]`` in another size: bilinear, over all the pixels that a smaller one covers."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def image_facts(images: Tensor) -> dict[str, Any]:
    """What :class:`Images` knows of the stored training images."""
    mean, deviation = statistics(images)
    return {"mean": mean, "deviation": deviation, "image_size": images.shape[-1], "channels": images.shape[1]}


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, ``[C, 1, 1]``, of stored images in [0, 1]; a deviation is never zero."""

    def mean_of(function: Callable[[Tensor], Tensor]) -> Tensor:
        # A few images at a time: all of them as float64 would take eight times their memory.
        sums = [function(unit(chunk).double()).sum((0, 2, 3), keepdim=True)[0] for chunk in images.split(4096)]
        return torch.stack(sums).sum(0) / (images.numel() // images.shape[1])

    mean = mean_of(lambda image: image)
    deviation = mean_of(lambda image: (image - mean) ** 2).sqrt()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0).float()


def split_off(columns: Columns, share: float, seed: int) -> tuple[Columns, Columns]:
    """A share of the examples, drawn by ``seed``: first those that are left, then those that were taken.

    Raises:
        ValueError: there are too few for both.
    """
    count = len(columns[0])
    taken = round(share * count)
    if not 0 < taken < count:
        raise ValueError(f"{count} examples are too few to set {share:.0%} of them aside")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    part, rest = order.tensor_split([taken])
    return tuple(column[rest] for column in columns), tuple(column[part] for column in columns)


def classified_images(
    train: Columns, test: Columns, num_classes: int, seed: int, validation: Columns | None = None
) -> ClassifiedImages:
    """The data set of these images and classes; validation examples are drawn from the training ones if not given."""
    if validation is None:
        train, validation = split_off(train, VALIDATION_SHARE, seed)
    facts = image_facts(train[0])
    return ClassifiedImages(train=train, validation=validation, test=test, num_classes=num_classes, **facts)


def three_parts(train: Columns, test: Columns, seed: int) -> dict[str, Any]:
    """The parts of a :class:`DataSet` whose validation examples ``seed`` draws from the training ones."""
    train, validation = split_off(train, VALIDATION_SHARE, seed)
    return {"train": train, "validation": validation, "test": test}
