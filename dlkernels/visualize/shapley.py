"""Shapley values: how much each patch of an image contributes to a class's score (Shapley 1953; Lundberg & Lee 2017).

A patch is absent when its pixels have the baseline's value. Its contribution is what its presence adds, averaged over
all orders in which the patches may appear. The contributions of all patches add up to the score of the image less that
of the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import draw_images_and_maps
from .inspection import BATCH_SIZE, checked_classes, checked_images, class_scores, inspecting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = Callable[[Tensor], Tensor]
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
        raise ValueError(f"exact values take at most {MOST_PATCHES} patches, but patch_size={patch_size} makes "
                         f"{patches.numel()}; give permutations")
    mask = patches.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1).to(images.device)  # [H, W]
    generator = torch.Generator().manual_seed(seed)
    with inspecting(model):
        checked_classes(classes, images, class_scores(model, images[:1]).shape[1])
        values = []
        for image, label in zip(images, classes.tolist(), strict=True):

            def scores(subsets: Tensor, image: Tensor = image, label: int = label) -> Tensor:
                """Of the image with the patches of each subset alone: bool ``[M, patches]`` to float64 ``[M]``."""
                shown = (torch.where(part.to(mask.device)[:, None, mask], image, baseline)
                         for part in subsets.split(BATCH_SIZE))
                return torch.cat([class_scores(model, part)[:, label].double().cpu() for part in shown])

            exact = permutations is None
            values.append(_exact(scores, patches.numel()) if exact else _sampled(scores, patches.numel(), permutations, generator))
    return torch.stack(values).view(-1, *patches.shape).to(images)


def _exact(scores: Scores, count: int) -> Tensor:
    """``[count]``: the sum over all subsets S of the share of score(S with i) - score(S without i)."""
    patches = torch.arange(count)
    subsets = (torch.arange(2**count)[:, None] >> patches & 1).bool()  # [2^count, count]
    # The share of the orders in which exactly the s patches of a subset come before i.
    shares = torch.tensor([1 / (count * math.comb(count - 1, s)) for s in range(count)], dtype=torch.float64)
    size = subsets.sum(1, keepdim=True)
    weights = torch.where(subsets, shares[(size - 1).clamp(min=0)], -shares[size.clamp(max=count - 1)])
    return scores(subsets) @ weights


def _sampled(scores: Scores, count: int, permutations: int, generator: torch.Generator) -> Tensor:
    """``[count]``: what each patch adds to those before it, averaged over random orders (Castro et al. 2009)."""
    places = torch.stack([torch.randperm(count, generator=generator) for _ in range(permutations)])  # of each patch
    subsets = places[:, None] < torch.arange(count + 1)[:, None]  # the first none, one, two... patches of each order
    gains = scores(subsets.flatten(0, 1)).view(permutations, count + 1).diff()  # of the patch in each place
    return gains.gather(1, places).mean(0)


def draw_shapley_values(images: Tensor, values: Tensor, classes: Tensor) -> Figure:
    """Images above what :func:`shapley_values` returned for them, with the numbers."""
    captions = [f"class {int(label)}" for label in classes]
    figure = draw_images_and_maps(images, values, "Shapley values", "contribution to the score", captions)
    for axis, contributions in zip(figure.axes[len(images) : 2 * len(images)], values, strict=True):
        for row, line in enumerate(contributions.tolist()):
            for column, value in enumerate(line):
                axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7)
    return figure
