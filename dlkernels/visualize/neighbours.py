"""Nearest neighbours in feature space: what the network takes for alike, unlike pixels (Krizhevsky et al. 2012,
figure 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import grid, show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def nearest_neighbours(queries: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The features nearest to each query by Euclidean distance, nearest first.

    Args:
        queries: ``[Q, D]``; or ``[Q, C, H, W]`` with ``features`` likewise, for neighbours in pixels.
        features: ``[N, D]``.
        count: how many.

    Returns:
        Their indices, int64 ``[Q, count]``, and their distances ``[Q, count]``.

    Raises:
        ValueError: there are fewer than ``count`` features, or the shapes do not fit.
    """
    from sklearn.neighbors import NearestNeighbors

    if queries.shape[1:] != features.shape[1:]:
        raise ValueError(
            f"queries must be shaped as features, {list(features.shape[1:])}, got {list(queries.shape[1:])}"
        )
    if not 1 <= count <= len(features):
        raise ValueError(f"count must be between 1 and the {len(features)} features, got {count}")
    searched, asked = (values.detach().flatten(1).cpu().double().numpy() for values in (features, queries))
    distances, indices = NearestNeighbors(n_neighbors=count).fit(searched).kneighbors(asked)
    return torch.from_numpy(indices).to(queries.device), torch.from_numpy(distances).to(queries)


def draw_neighbours(
    query_images: Tensor, query_labels: Tensor, images: Tensor, labels: Tensor, indices: Tensor, distances: Tensor
) -> Figure:
    """A row for each query: its image, then its neighbours' with their class and distance.

    Args:
        query_images, query_labels: ``[Q, C, H, W]``, ``[Q]``.
        images, labels: ``[N, C, H, W]``, ``[N]``, which ``indices`` point to.
        indices, distances: of :func:`nearest_neighbours`.
    """
    figure, axes = grid(len(indices), indices.shape[1] + 1, "Nearest neighbours in feature space", 1.2, 1.3)
    for row, (found, away) in enumerate(zip(indices, distances, strict=True)):
        show_image(axes[row, 0], query_images[row], f"query: {int(query_labels[row])}")
        for column, (index, distance) in enumerate(zip(found, away, strict=True), 1):
            show_image(axes[row, column], images[index], f"{int(labels[index])}, at {distance.item():.3g}")
    return figure
