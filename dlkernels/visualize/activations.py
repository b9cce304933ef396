"""Activation maps: where in an image each channel of a layer responds (Yosinski et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import grid, near_square, show_image
from .inspection import BATCH_SIZE, checked_images, inspecting, layer_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def activation_maps(model: torch.nn.Module, images: Tensor, layer: str) -> Tensor:
    """What a layer returns for images ``[N, C, H, W]``: of a convolution ``[N, channels, height, width]``.

    Args:
        layer: its name in ``model.named_modules()``.

    Raises:
        ValueError: there is no such layer, or it is not called in evaluation mode.
    """
    with inspecting(model):
        return torch.cat([layer_outputs(model, layer, part) for part in checked_images(images).split(BATCH_SIZE)])


def draw_activation_maps(image: Tensor, maps: Tensor, layer: str) -> Figure:
    """An image ``[C, H, W]`` and the maps of all channels ``[channels, height, width]``, white where it is strongest.

    All have the same black and white, so that channels that do not respond are black.

    Raises:
        ValueError: ``maps`` has another number of dimensions.
    """
    if maps.dim() != 3:
        raise ValueError(f"maps must be [channels, height, width], got {list(maps.shape)}")
    rows, columns = near_square(len(maps) + 1)
    figure, axes = grid(rows, columns, f"Activation maps of {layer}: {' x '.join(map(str, maps.shape))}", 1.0, 1.15)
    show_image(axes.flat[0], image, "image")
    limits = (maps.min().item(), maps.max().item())
    for channel, (axis, values) in enumerate(zip(axes.flat[1:], maps, strict=False)):
        show_image(axis, values[None], f"{channel}", limits)
    return figure
