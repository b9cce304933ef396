"""The linear classifier (Rosenblatt 1958): a score for each class, a weighted sum of the pixels.

**Templates.** The score of class c is the inner product of the image with row c of the weight, so the row is a picture
of what the class looks for: ``model.scores.weight.unflatten(1, (3, 32, 32))`` are ten pictures for CIFAR-10.

**The bias trick.** ``W x + b`` is ``[W b] [x; 1]``: a pixel that is always one makes the bias a column of the weight.
The numbers are the same; here the bias stays apart, so that an optimiser can leave it out of weight decay.

The loss is not part of the classifier: softmax with temperature T is ``CrossEntropyLoss()(logits / T, labels)``, the
multiclass support vector machine (Weston & Watkins 1999) is ``torch.nn.MultiMarginLoss(p=1)``, and ``p=2`` squared.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .registry import register


@register
class LinearClassifier(torch.nn.Module):
    """Images ``[N, ...]`` of ``in_features`` pixels in all to logits ``[N, num_classes]``.

    Weights start so near zero that all classes are equally likely: the first loss of a softmax is log(num_classes).

    Args:
        in_features: pixels of an image times its channels; 3072 for CIFAR-10, 784 for MNIST.
        num_classes: classes to tell apart.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(self, in_features: int = 3072, num_classes: int = 10, layers: ModuleType = nn) -> None:
        super().__init__()
        self.scores = layers.Linear(in_features, num_classes)
        torch.nn.init.normal_(self.scores.weight, std=1e-4)
        torch.nn.init.zeros_(self.scores.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x.flatten(1))  # [N, num_classes]
