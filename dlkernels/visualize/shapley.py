"""Shapley values: how much each patch of an image contributes to a class's score (Shapley 1953; Lundberg & Lee 2017).

A patch is absent when its pixels have the baseline's value. Its contribution is what its presence adds, averaged over
all orders in which the patches may appear. The contributions of all patches add up to the score of the image less that
of the baseline.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import draw_images_and_maps
from .inspection import BATCH_SIZE, checked_classes, checked_images, class_scores, inspecting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PATCHES = 16  # whose 65,536 subsets are still evaluated


def shapley_values(
    model: torch.nn.Module,
    images: Tensor,
    classes: Tensor,
    patch_size: int,
    permutations: int | None = None,
    baseline: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Contribution of each patch to the logit of a class.

    Args:
        images: ``[N, C, H, W]``.
        classes: the class of each whose score is explained, int64 ``[N]``.
        patch_size: height and width P of a patch, of which H and W are multiples.
        permutations: how many random orders of the patches to average over; exact, over all subsets of at most 16
            patches, if not given.
        baseline: the value of pixels that are absent; zero is the mean of normalised images.
        seed: draws the orders.

    Returns:
        ``[N, H / P, W / P]``.

    Raises:
        ValueError: the images are no whole number of patches, or too many for exact values.
    """
    images = checked_images(images)
    height, width = images.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide images of {height} x {width}, got {patch_size}")
    if permutations is not None and permutations < 1:
        raise ValueError(f"permutations must be positive, got {permutations}")
    patches = torch.arange(height * width // patch_size**2).view(height // patch_size, width // patch_size)
    if permutations is None and patches.numel() > MOST_PATCHES:
        raise ValueError(
            f"exact values take at most {MOST_PATCHES} patches, but patch_size={patch_size} makes "
            f"{patches.numel()}; give permutations"
        )
    if permutations is None:
        subsets, weights = _all_subsets(patches.numel())
    else:
        subsets, weights = _random_orders(patches.numel(), permutations, seed)
    patch_of_pixel = patches.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)  # [H, W]
    with inspecting(model):
        checked_classes(classes, images, class_scores(model, images[:1]).shape[1])
        values = []
        for image, label in zip(images, classes.tolist(), strict=True):
            scores = []
            for part in subsets.split(BATCH_SIZE):
                present = part[:, None, patch_of_pixel].to(images.device)  # [B, 1, H, W]
                scores.append(class_scores(model, torch.where(present, image, baseline))[:, label])
            values.append(torch.cat(scores).cpu().double() @ weights)
    return torch.stack(values).view(-1, *patches.shape).to(images)


def _all_subsets(count: int) -> tuple[Tensor, Tensor]:
    """Subsets of the patches, bool ``[2^count, count]``, and by what a subset's score counts for each patch, likewise.

    The value of patch i is the mean of score(S with i) - score(S without i) over the orders in which S comes before i.
    """
    subsets = (torch.arange(2**count)[:, None] >> torch.arange(count) & 1).bool()
    # The share of the orders in which exactly the s patches of a set come before i.
    shares = torch.tensor([1 / (count * math.comb(count - 1, s)) for s in range(count)], dtype=torch.float64)
    size = subsets.sum(1, keepdim=True)
    weights = torch.where(subsets, shares[(size - 1).clamp(min=0)], -shares[size.clamp(max=count - 1)])
    return subsets, weights


def _random_orders(count: int, permutations: int, seed: int) -> tuple[Tensor, Tensor]:
    """The first none, one, two... patches of random orders, and by what the score of each counts for each patch, both
    ``[permutations * (count + 1), count]``: each patch has what it adds to those before it (Castro et al. 2009)."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randperm(count, generator=generator) for _ in range(permutations)])[:, None]
    size = torch.arange(count + 1)[:, None]
    weights = ((place == size - 1).double() - (place == size).double()) / permutations
    return (place < size).flatten(0, 1), weights.flatten(0, 1)


def draw_shapley_values(images: Tensor, values: Tensor, classes: Tensor) -> Figure:
    """Images above what :func:`shapley_values` returned for them, with the numbers."""
    captions = [f"class {int(label)}" for label in classes]
    figure = draw_images_and_maps(images, values, "Shapley values", "contribution to the score", captions)
    dark = 0.6 * values.abs().max().item()
    for axis, contributions in zip(figure.axes[len(images) : 2 * len(images)], values, strict=True):
        for row, line in enumerate(contributions.tolist()):
            for column, value in enumerate(line):
                colour = "white" if abs(value) > dark else "black"
                number = round(value, 1) + 0.0  # no negative zero
                axis.text(column, row, f"{number:.1f}", ha="center", va="center", fontsize=7, color=colour)
    return figure
