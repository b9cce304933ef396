"""Averages of predictions: of several networks (Hansen & Salamon 1990), and of several views of an image (Krizhevsky et
al. 2012, section 4.1).

Both are classifiers themselves. Their logits are the logarithms of the averaged probabilities, so that softmax returns
the average, and cross-entropy, accuracy and attacks take them for what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]


def log_mean_probability(logits: Sequence[Tensor]) -> Tensor:
    """Logarithm of the mean of the softmaxes of logits ``[N, classes]``."""
    return torch.stack([one.log_softmax(1) for one in logits]).logsumexp(0) - math.log(len(logits))


class Ensemble(torch.nn.Module):
    """The average of networks: images to logits ``[N, classes]``.

    Args:
        models: classifiers with the same classes.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, models: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        if not self.models:
            raise ValueError("models must be at least one, got none")

    def forward(self, x: Tensor) -> Tensor:
        return log_mean_probability([model(x) for model in self.models])


class TestTimeAugmentation(torch.nn.Module):
    """The average of a network over views of an image: images to logits ``[N, classes]``.

    Args:
        model: a classifier.
        views: functions of images to images, for instance the identity and a flip, ``lambda x: x.flip(-1)``.

    Raises:
        ValueError: there are no views.
    """

    def __init__(self, model: torch.nn.Module, views: Sequence[View]) -> None:
        super().__init__()
        if not views:
            raise ValueError("views must be at least one, got none")
        self.model = model
        self.views = tuple(views)

    def forward(self, x: Tensor) -> Tensor:
        return log_mean_probability([self.model(view(x)) for view in self.views])
