"""Occlusion: how much less probable a class becomes when a part of the image is covered (Zeiler & Fergus 2014, section
4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import draw_images_and_maps
from .inspection import checked_classes, checked_images, class_scores, inspecting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def occlusion(
    model: torch.nn.Module, images: Tensor, classes: Tensor, size: int, stride: int = 1, value: float = 0.0
) -> Tensor:
    """By how much the probability of its class falls, on average over the squares that cover a pixel.

    Args:
        images: ``[N, C, H, W]``.
        classes: the class of each whose probability is watched, int64 ``[N]``.
        size: height and width of the square.
        stride: by which it moves.
        value: what covers the pixels; zero is the mean of normalised images.

    Returns:
        ``[N, H, W]``; positive where the pixels speak for the class.

    Raises:
        ValueError: the square is larger than the images, or its stride larger than itself, which would leave pixels
            out.
    """
    from captum.attr import Occlusion

    images = checked_images(images)
    if not 1 <= size <= min(images.shape[2:]):
        raise ValueError(f"size must be between 1 and that of images {list(images.shape)}, got {size}")
    if not 1 <= stride <= size:
        raise ValueError(f"stride must be between 1 and size, {size}, got {stride}")

    def probabilities(covered: Tensor) -> Tensor:
        return class_scores(model, covered).softmax(1)

    with inspecting(model):
        checked_classes(classes, images, probabilities(images[:1]).shape[1])
        channels = images.shape[1]
        drops = Occlusion(probabilities).attribute(
            images,
            sliding_window_shapes=(channels, size, size),
            strides=(channels, stride, stride),
            baselines=value,
            target=classes,
            perturbations_per_eval=16,
        )
    return drops[:, 0].to(images)  # all channels are covered together


def draw_occlusion(images: Tensor, drops: Tensor, classes: Tensor) -> Figure:
    """Images above what :func:`occlusion` returned for them."""
    captions = [f"class {int(label)}" for label in classes]
    return draw_images_and_maps(images, drops, "Occlusion", "fall of the probability", captions)
