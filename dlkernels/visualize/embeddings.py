"""Features in two dimensions: principal components (Pearson 1901) and t-SNE (van der Maaten & Hinton 2008)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pca(features: Tensor, dimensions: int = 2) -> tuple[Tensor, Tensor]:
    """Coordinates along the directions of greatest variance.

    Args:
        features: ``[N, D]``.

    Returns:
        ``[N, dimensions]``, and the share of the whole variance that lies along each, ``[dimensions]``.

    Raises:
        ValueError: ``dimensions`` is more than N or D.
    """
    from sklearn.decomposition import PCA

    if not 1 <= dimensions <= min(features.shape):
        raise ValueError(
            f"dimensions must be between 1 and {min(features.shape)}, the least of N and D in features "
            f"{list(features.shape)}, got {dimensions}"
        )
    analysis = PCA(dimensions, svd_solver="full")
    points = analysis.fit_transform(features.detach().cpu().double().numpy())
    return torch.from_numpy(points).to(features), torch.from_numpy(analysis.explained_variance_ratio_).to(features)


def tsne(features: Tensor, perplexity: float = 30.0) -> Tensor:
    """Points ``[N, 2]`` whose neighbourhoods are those of the features; distances between clusters mean nothing.

    Starts from the principal components, so that the result is the same every time.

    Args:
        features: ``[N, D]``, D at least 2.
        perplexity: how many neighbours a point has, softly counted.

    Raises:
        ValueError: there are no more features than ``perplexity``, or D is 1.
    """
    from sklearn.manifold import TSNE

    if not 0 < perplexity < len(features):
        raise ValueError(f"perplexity must be positive and less than the {len(features)} features, got {perplexity}")
    if features.shape[1] < 2:
        raise ValueError(f"features must be [N, D] with D at least 2, got {list(features.shape)}")
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return torch.from_numpy(embedding.fit_transform(features.detach().cpu().float().numpy())).to(features)


def draw_embedding(points: Tensor, labels: Tensor, title: str) -> Figure:
    """Points ``[N, 2]`` in a colour for each class of ``labels`` ``[N]``."""
    from matplotlib import colormaps

    figure, axis = plot(f"{title}: {len(points)} images", "first dimension", "second dimension")
    classes = labels.unique().tolist()
    colours = colormaps["tab10" if len(classes) <= 10 else "turbo"].resampled(
        max(len(classes), 10 * (len(classes) <= 10))
    )
    for position, label in enumerate(classes):
        own = points[labels == label].cpu()
        axis.scatter(own[:, 0], own[:, 1], s=9, color=colours(position), label=str(label))
    axis.legend(title="class", fontsize=8, markerscale=1.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
