"""Saliency: the gradient of a class's score with respect to the image (Simonyan et al. 2014, section 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import draw_images_and_maps, magnitude
from .inspection import checked_classes, checked_images, class_scores, inspecting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def saliency(model: torch.nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """By how much the logit of a class grows with each pixel.

    Args:
        images: ``[N, C, H, W]``.
        classes: the class of each whose score is differentiated, int64 ``[N]``.

    Returns:
        ``[N, C, H, W]``, with sign. The paper's map is its greatest magnitude over the channels.
    """
    from captum.attr import Saliency

    images = checked_images(images).requires_grad_()
    with inspecting(model, gradients=True):
        checked_classes(classes, images, class_scores(model, images[:1]).shape[1])
        return Saliency(lambda batch: class_scores(model, batch)).attribute(images, target=classes, abs=False)


def draw_saliency(images: Tensor, gradients: Tensor, classes: Tensor) -> Figure:
    """Images above what :func:`saliency` returned for them, of each pixel the channel with the greatest magnitude."""
    captions = [f"class {int(label)}" for label in classes]
    title = "Saliency: gradient of the score"
    return draw_images_and_maps(images, magnitude(gradients), title, "gradient (own scales)", captions, True)
