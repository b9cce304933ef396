"""What the figures share. They are matplotlib's, made without its global state; :func:`save` writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..writing import output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG, in a folder that is made where there is none; returns the path.

    Raises:
        OSError: it cannot be written; the error names the path, which is as it was.
        ValueError: the path does not end in ``.png``.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with output(path) as place:
        figure.savefig(place, dpi=110, format="png")
    return path


def grid(rows: int, columns: int, title: str, width: float = 1.5, height: float = 1.5) -> tuple[Figure, Any]:
    """A figure with a title, and ``[rows, columns]`` axes without ticks, of the given size in inches each."""
    from matplotlib.figure import Figure

    size = (max(columns * width, 0.09 * len(title), 3.0), rows * height + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def plot(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """A figure with a title and one pair of axes, labelled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    return figure, axis


def near_square(count: int) -> tuple[int, int]:
    """Rows and columns for ``count`` cells: up to four times as wide as high, with as few empty cells as can be."""
    narrowest = math.ceil(math.sqrt(count))
    columns = min(range(narrowest, 2 * narrowest), key=lambda columns: -count % columns)
    return math.ceil(count / columns), columns


def show_image(axis: Axes, image: Tensor, caption: str = "", limits: tuple[float, float] | None = None) -> None:
    """An image ``[C, H, W]``: in colour if C is 3, else the mean of its channels in grey.

    Args:
        limits: what black and white stand for; the least and the greatest value of the image if not given.
    """
    low, high = limits or (image.min().item(), image.max().item())
    scaled = ((image.detach().cpu().float() - low) / max(high - low, 1e-12)).clamp(0, 1)
    if len(image) == 3:
        axis.imshow(scaled.permute(1, 2, 0).numpy())
    else:
        axis.imshow(scaled.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(caption, fontsize=8)


def show_map(axis: Axes, values: Tensor, caption: str = "", largest: float | None = None) -> Any:
    """Values ``[H, W]`` with zero in white, positive ones in red and negative ones in blue.

    Args:
        largest: the value in the darkest red; the greatest of all magnitudes if not given.
    """
    largest = largest or max(values.abs().max().item(), 1e-12)
    drawn = axis.imshow(values.detach().cpu().float().numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
    axis.set_title(caption, fontsize=8)
    return drawn


def draw_images_and_maps(
    images: Tensor, maps: Tensor, title: str, scale: str, captions: Sequence[str], each_its_own: bool = False
) -> Figure:
    """Images ``[N, C, H, W]`` above their maps ``[N, H, W]``.

    Args:
        scale: what the values of the maps are.
        each_its_own: whether each map has a scale of its own rather than all the same.
    """
    figure, axes = grid(2, len(images), title)
    largest = None if each_its_own else max(maps.abs().max().item(), 1e-12)
    limits = (images.min().item(), images.max().item())
    for column, (image, values, caption) in enumerate(zip(images, maps, captions, strict=True)):
        show_image(axes[0, column], image, caption, limits)
        drawn = show_map(axes[1, column], values, largest=largest)
    bar = figure.colorbar(drawn, ax=axes[1, :].tolist(), shrink=0.9)
    bar.set_label(scale, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if each_its_own:
        bar.set_ticks([])
    return figure


def magnitude(maps: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N, H, W]``: in each pixel the value of the channel where it is greatest in magnitude."""
    channel = maps.abs().argmax(1, keepdim=True)
    return torch.gather(maps, 1, channel).squeeze(1)
