"""First-layer filters: what the network looks for in an image, as images (Krizhevsky et al. 2012, figure 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import grid, near_square, show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def first_layer_filters(model: torch.nn.Module, image_shape: tuple[int, int, int] | None = None) -> Tensor:
    """The weights of the first convolution, ``[filters, C / groups, kernel height, kernel width]``.

    Of a network without convolutions, those of the first linear layer, ``[features, C, H, W]``: a linear classifier's
    are the templates of the classes.

    Args:
        image_shape: ``(C, H, W)``, which a linear layer does not know.

    Raises:
        ValueError: the network has neither, or its first layer is linear and does not take images of ``image_shape``.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            return module.weight.detach().clone()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            pixels = module.in_features
            if image_shape is None or torch.Size(image_shape).numel() != pixels:
                raise ValueError(f"image_shape must be (C, H, W) with {pixels} pixels in all, got {image_shape}")
            return module.weight.detach().clone().unflatten(1, image_shape)
    raise ValueError(f"model must have a convolution or a linear layer, {type(model).__name__} has none")


def draw_filters(filters: Tensor) -> Figure:
    """Every filter, each with its own black and white."""
    count, *shape = filters.shape
    rows, columns = near_square(count)
    title = f"{count} first-layer filters, {' x '.join(map(str, shape))}"
    figure, axes = grid(rows, columns, title, width=0.8, height=0.8)
    for axis, image in zip(axes.flat, filters, strict=False):
        show_image(axis, image)
    return figure
