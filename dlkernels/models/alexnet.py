"""AlexNet in one column (Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks"), after the
network that won ImageNet's contest of 2012 in two (Krizhevsky et al. 2012)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .registry import register


class AlexNet(torch.nn.Module):
    """Five convolutions and three linear layers: images ``[N, 3, H, W]``, 63 x 63 at least, to ``[N, num_classes]``.

    Args:
        dropout: probability before each of the two hidden linear layers.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5, *, layers: ModuleType = nn) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            layers.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(kernel_size=3, stride=2),
            layers.Conv2d(64, 192, kernel_size=5, padding=2),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(kernel_size=3, stride=2),
            layers.Conv2d(192, 384, kernel_size=3, padding=1),
            torch.nn.ReLU(),
            layers.Conv2d(384, 256, kernel_size=3, padding=1),
            torch.nn.ReLU(),
            layers.Conv2d(256, 256, kernel_size=3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = torch.nn.AdaptiveAvgPool2d(6)  # what the features of 224 x 224 pixels have already
        self.classifier = torch.nn.Sequential(
            torch.nn.Dropout(dropout),
            layers.Linear(256 * 6 * 6, 4096),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            layers.Linear(4096, 4096),
            torch.nn.ReLU(),
            layers.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, 256, about H/32, about W/32]
        x = self.avgpool(x)  # [N, 256, 6, 6]
        return self.classifier(x.flatten(1))  # [N, num_classes]


@register
def alexnet(**arguments: Any) -> AlexNet:
    """AlexNet: 61.1 million parameters."""
    return AlexNet(**arguments)
