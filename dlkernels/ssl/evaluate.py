"""What frozen features are worth: classifiers that only look at them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import functional as F
from .contrastive import check_temperature


@torch.no_grad()
def features_of(encoder: torch.nn.Module, images: Tensor, batch_size: int = 512) -> Tensor:
    """Features ``[N, D]`` of images in evaluation; any further dimensions are flattened.

    Args:
        encoder: any module from images to features, each part of which is left in its mode.
        images: ``[N, C, H, W]``.
        batch_size: images that are encoded at a time.
    """
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    features = torch.cat([encoder(part).flatten(1) for part in images.split(batch_size)])
    for module, training in modes:
        module.training = training
    return features


def linear_probe(features: Tensor, labels: Tensor, queries: Tensor, penalty: float = 1e-2) -> Tensor:
    """Classes ``[M]`` that a linear classifier of ``features`` gives ``queries``.

    Features are standardised; softmax regression with an L2 penalty is fitted by L-BFGS on all of them at once.

    Args:
        features: ``[N, D]``, frozen.
        labels: their classes ``[N]``, from 0.
        queries: ``[M, D]``, features of other images.
        penalty: weight of half the sum of the squared weights.

    Raises:
        ValueError: the shapes do not fit, ``penalty`` is negative, or there is one class alone.
    """
    classes = _check_examples(features, labels, queries)
    if not penalty >= 0:
        raise ValueError(f"penalty must not be negative, got {penalty}")
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    features, queries = (features - mean) / deviation, (queries - mean) / deviation
    weight = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=features.dtype, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.linear_cross_entropy(features, weight, labels, linear_bias=bias) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        return F.linear(queries, weight, bias).argmax(1)


def weighted_knn(features: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Classes ``[M]`` that the nearest of ``features`` give ``queries`` (Wu et al. 2018, *Unsupervised feature learning
    via non-parametric instance discrimination*, section 3.4).

    Each of the ``k`` most similar votes for its class with the weight ``exp(cosine / temperature)``.

    Args:
        features: ``[N, D]``, frozen.
        labels: their classes ``[N]``, from 0.
        queries: ``[M, D]``, features of other images.
        k: how many vote.
        temperature: the lower, the more the nearest ones count.

    Raises:
        ValueError: the shapes do not fit, there is one class alone, ``k`` is not between 1 and N, or ``temperature`` is
            not positive.
    """
    classes = _check_examples(features, labels, queries)
    if not 1 <= k <= len(features):
        raise ValueError(f"k must be between 1 and the number of examples, {len(features)}, got {k}")
    check_temperature(temperature)
    cosines = normalize(queries, dim=1) @ normalize(features, dim=1).T  # [M, N]
    cosines, nearest = cosines.topk(k, 1)  # [M, k]
    weights = ((cosines - 1) / temperature).exp()  # less the greatest possible: no overflow
    votes = weights.new_zeros(len(queries), classes).scatter_add_(1, labels[nearest], weights)
    return votes.argmax(1)


def _check_examples(features: Tensor, labels: Tensor, queries: Tensor) -> int:
    """The number of classes, after checks of what both classifiers take."""
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be [N, D] and labels [N], got shapes {list(features.shape)} and {list(labels.shape)}"
        )
    if queries.dim() != 2 or queries.shape[1] != features.shape[1]:
        raise ValueError(f"queries must be [M, {features.shape[1]}], as features, got shape {list(queries.shape)}")
    if len(labels.unique()) < 2:
        raise ValueError("labels must be of at least two classes")
    return int(labels.max()) + 1
