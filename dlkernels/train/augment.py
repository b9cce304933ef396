"""Augmentation that makes new examples of a batch: Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) and Cutout
(DeVries & Taylor 2017).

Each takes images ``[N, C, H, W]`` and labels to images and labels, so that they can be applied one after the other.
Labels are classes, int64 ``[N]``, or shares of classes ``[N, classes]``, which cross-entropy takes just as well. Random
numbers come from torch's generators, which ``torch.manual_seed`` seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def label_shares(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Shares of classes ``[N, num_classes]``: all of it in the class of each label; shares are returned as they are.

    Raises:
        ValueError: labels are neither, or of another number of classes.
    """
    if labels.dim() == 1 and labels.dtype == torch.int64:
        return torch.nn.functional.one_hot(labels, num_classes).to(dtype)
    if labels.dim() != 2 or labels.shape[1] != num_classes or not labels.is_floating_point():
        expected = f"int64 [N] or floating [N, {num_classes}]"
        raise ValueError(f"labels must be {expected}, got {labels.dtype} {list(labels.shape)}")
    return labels


def _check_mixing(num_classes: int, alpha: float) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")


def _partners(images: Tensor) -> Tensor:
    """For each image the index of the one that it is mixed with."""
    if len(images) < 2:
        raise ValueError(f"images must be at least two to be mixed, got {len(images)}")
    return torch.randperm(len(images), device=images.device)


def _draw_share(alpha: float) -> float:
    """From the symmetric beta distribution: near 0 or 1 for a small ``alpha``, near a half for a large one."""
    return torch.distributions.Beta(alpha, alpha).sample().item()


@dataclass(frozen=True)
class Mixup:
    """Weighted sums of two images and of their labels, with one weight for the batch.

    Args:
        num_classes: at least 2.
        alpha: of the beta distribution that the weight is drawn from.

    Raises:
        ValueError: an argument is out of range; called with fewer than two images, or labels that do not fit.
    """

    num_classes: int
    alpha: float = 0.2

    def __post_init__(self) -> None:
        _check_mixing(self.num_classes, self.alpha)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and shares of the classes ``[N, num_classes]``."""
        partners, weight = _partners(images), _draw_share(self.alpha)
        shares = label_shares(labels, self.num_classes, images.dtype)
        return torch.lerp(images[partners], images, weight), torch.lerp(shares[partners], shares, weight)


@dataclass(frozen=True)
class CutMix:
    """A rectangle of each image is replaced by that of another, and as much of the label as of the pixels.

    The rectangle, the same for the whole batch, has the image's proportions and is centred anywhere; what is outside
    the image is lost, and the labels' shares are those of the pixels that are left.

    Args:
        num_classes: at least 2.
        alpha: of the beta distribution that the share to be kept is drawn from, before the rectangle is cut off.

    Raises:
        ValueError: an argument is out of range; called with fewer than two images, or labels that do not fit.
    """

    num_classes: int
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_mixing(self.num_classes, self.alpha)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images, and shares of the classes ``[N, num_classes]``."""
        partners = _partners(images)
        shares = label_shares(labels, self.num_classes, images.dtype)
        side = math.sqrt(1 - _draw_share(self.alpha))  # as a share of the image's
        inside = torch.ones((), dtype=torch.bool, device=images.device)
        for dimension in (2, 3):
            size = images.shape[dimension]
            line = _segment(size, torch.randint(size, (1,)), round(side * size)).view(-1, *[1] * (3 - dimension))
            inside = inside & line.to(images.device)  # [H, W] in the end
        replaced = inside.float().mean().item()
        return torch.where(inside, images[partners], images), torch.lerp(shares, shares[partners], replaced)


@dataclass(frozen=True)
class Cutout:
    """A square of zeros, the mean of normalised images, in each image. Labels stay as they are.

    The square is centred on any pixel of the image, and what is outside the image is lost.

    Args:
        size: height and width of the square.

    Raises:
        ValueError: ``size`` is not positive.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be positive, got {self.size}")

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images with a hole, and the labels."""
        count, _, height, width = images.shape
        rows = _segment(height, torch.randint(height, (count,)), self.size)  # [N, H]
        columns = _segment(width, torch.randint(width, (count,)), self.size)  # [N, W]
        hole = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device)  # [N, 1, H, W]
        return images.masked_fill(hole, 0), labels


def _segment(size: int, centres: Tensor, length: int) -> Tensor:
    """Which of ``size`` positions lie in the segment of a length around each centre: bool ``[centres, size]``."""
    starts = centres[:, None] - length // 2
    positions = torch.arange(size)
    return (positions >= starts) & (positions < starts + length)
