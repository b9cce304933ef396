"""Maximally activating patches: the parts of images that one channel responds to most (Girshick et al. 2014, figure 3;
Springenberg et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activation_maps
from .figures import grid, show_image
from .inspection import BATCH_SIZE, checked_images, hooked, inspecting, layer_outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MaximalPatches:
    """The K strongest responses of a channel, strongest first, one an image at most."""

    patches: list[Tensor]  # the pixels that each depends on, [C, height, width]
    boxes: Tensor  # where they lie: top, left, bottom, right, the last two exclusive, int64 [K, 4]
    images: Tensor  # indices of their images, int64 [K]
    activations: Tensor  # [K]


def receptive_fields(
    model: torch.nn.Module, layer: str, channel: int, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Which rows and columns of an image each unit of a channel can depend on.

    Exactly those: a row of NaN is put into an image, and makes NaN of the units that read it, through whatever there is
    between them. Convolutions are made to mark what their windows touch: fast algorithms, which compute several
    outputs together, would mark some beside it. Weights play no part, so an activation that is zero hides nothing.

    Args:
        layer: its name in ``model.named_modules()``. It returns ``[N, channels, h, w]`` or ``[N, channels]``, of which
            a channel is one unit.
        channel: of the layer.
        image_shape: ``(C, H, W)``.

    Returns:
        ``rows`` ``[h, w, H]`` and ``columns`` ``[h, w, W]``, bool: row y has pixels that unit (i, j) depends on where
        ``rows[i, j, y]``.

    Raises:
        ValueError: there is no such layer or channel.
    """
    like = next(model.parameters(), torch.empty(0))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    marked = []
    with inspecting(model), hooked(convolutions, _mark_windows):
        for dimension, size in ((1, image_shape[1]), (2, image_shape[2])):
            parts = []
            for lines in torch.arange(size).split(BATCH_SIZE):
                images = like.new_zeros(len(lines), *image_shape)
                for image, line in zip(images, lines, strict=True):
                    image.select(dimension, int(line)).fill_(torch.nan)
                parts.append(units_of(layer_outputs(model, layer, images), layer, channel).isnan())
            marked.append(torch.cat(parts).permute(1, 2, 0))
    return marked[0], marked[1]


def _mark_windows(convolution: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output of a convolution, NaN where a window touches a NaN, and nowhere else."""
    (x,) = inputs
    mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
    touched = x.isnan().unflatten(1, (convolution.groups, -1)).any(2).to(x.dtype)  # [N, groups, H, W]
    touched = F.pad(touched, convolution._reversed_padding_repeated_twice, mode)
    touched = F.max_pool2d(touched, convolution.kernel_size, convolution.stride, 0, convolution.dilation)
    touched = touched.repeat_interleave(convolution.out_channels // convolution.groups, 1)
    return torch.zeros_like(output).masked_fill(touched > 0, torch.nan)


def units_of(activations: Tensor, layer: str, channel: int) -> Tensor:
    """One channel of ``[N, channels, h, w]`` or ``[N, channels]``, as ``[N, h, w]``.

    Raises:
        ValueError: there is no such channel, or the shape is another.
    """
    if activations.dim() not in (2, 4):
        raise ValueError(
            f"layer must return [N, channels, h, w] or [N, channels], but {layer!r} returned {list(activations.shape)}"
        )
    if not 0 <= channel < activations.shape[1]:
        raise ValueError(f"channel must be in [0, {activations.shape[1]}), got {channel}")
    return activations[:, channel].reshape(len(activations), *(activations.shape[2:] or (1, 1)))


def maximal_patches(model: torch.nn.Module, images: Tensor, layer: str, channel: int, count: int = 9) -> MaximalPatches:
    """The patches of the images that the channel responds to most.

    Args:
        images: ``[N, C, H, W]``.
        layer: its name in ``model.named_modules()``.
        channel: of the layer.
        count: how many, of as many images.

    Raises:
        ValueError: there is no such layer or channel, or there are fewer than ``count`` images.
    """
    images = checked_images(images)
    if not 1 <= count <= len(images):
        raise ValueError(f"count must be between 1 and the {len(images)} images, got {count}")
    parts = [units_of(activation_maps(model, part, layer), layer, channel) for part in images.split(BATCH_SIZE)]
    width = parts[0].shape[2]
    strongest, positions = torch.cat(parts).flatten(1).max(1)  # [N]
    activations, chosen = strongest.topk(count)
    fields = receptive_fields(model, layer, channel, (images.shape[1], images.shape[2], images.shape[3]))
    boxes = []
    for position in positions[chosen].tolist():
        rows, columns = (field[position // width, position % width].nonzero() for field in fields)
        boxes.append([int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1])
    patches = [
        images[index][:, top:bottom, left:right].clone()
        for index, (top, left, bottom, right) in zip(chosen.tolist(), boxes, strict=True)
    ]
    return MaximalPatches(patches, torch.tensor(boxes), chosen, activations)


def draw_maximal_patches(found: MaximalPatches, images: Tensor, layer: str, channel: int) -> Figure:
    """The patches, and below each the whole image with the patch in a frame."""
    from matplotlib.patches import Rectangle

    title = f"What channel {channel} of {layer} responds to most"
    figure, axes = grid(2, len(found.patches), title, 1.3, 1.4)
    limits = (images.min().item(), images.max().item())
    for column, (patch, box, index) in enumerate(zip(found.patches, found.boxes.tolist(), found.images, strict=True)):
        show_image(axes[0, column], patch, f"{found.activations[column].item():.3g}", limits)
        show_image(axes[1, column], images[index], f"image {int(index)}", limits)
        top, left, bottom, right = box
        frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color="tab:red", linewidth=2)
        axes[1, column].add_patch(frame)
    return figure
