"""VGG (Simonyan & Zisserman 2015): 3x3 convolutions only, in table 1's configurations A, B, D and E; with batch
normalisation (Ioffe & Szegedy 2015) after each convolution for the networks whose names end in ``_bn``."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .registry import register


class VGG(torch.nn.Module):
    """Stages of 3x3 convolutions, each ended by a maximum that halves the image, and three linear layers: images
    ``[N, 3, H, W]``, 32 x 32 at least, to ``[N, num_classes]``.

    Args:
        stages: the channels of each convolution, stage by stage.
        batch_norm: whether a batch norm follows each convolution.
        init_weights: Kaiming's initial filters and small initial weights of the linear layers, rather than torch's.
        dropout: probability after each of the two hidden linear layers.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        batch_norm: bool = False,
        num_classes: int = 1000,
        init_weights: bool = True,
        dropout: float = 0.5,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        modules: list[torch.nn.Module] = []
        in_channels = 3
        for stage in stages:
            for channels in stage:
                modules.append(layers.Conv2d(in_channels, channels, kernel_size=3, padding=1))
                if batch_norm:
                    modules.append(layers.BatchNorm2d(channels))
                modules.append(torch.nn.ReLU())
                in_channels = channels
            modules.append(torch.nn.MaxPool2d(kernel_size=2))
        self.features = layers.Sequential(*modules)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(7)  # what the features of 224 x 224 pixels have already
        self.classifier = torch.nn.Sequential(
            layers.Linear(in_channels * 7 * 7, 4096),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            layers.Linear(4096, 4096),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            layers.Linear(4096, num_classes),
        )
        if init_weights:
            self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.01)
                torch.nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, channels, H/32, W/32]
        x = self.avgpool(x)  # [N, channels, 7, 7]
        return self.classifier(x.flatten(1))  # [N, num_classes]


A = ((64,), (128,), (256, 256), (512, 512), (512, 512))
B = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
D = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
E = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512))


@register
def vgg11(**arguments: Any) -> VGG:
    """VGG-11: 132.9 million parameters."""
    return VGG(A, **arguments)


@register
def vgg11_bn(**arguments: Any) -> VGG:
    """VGG-11 with batch norm."""
    return VGG(A, batch_norm=True, **arguments)


@register
def vgg13(**arguments: Any) -> VGG:
    """VGG-13: 133.0 million parameters."""
    return VGG(B, **arguments)


@register
def vgg13_bn(**arguments: Any) -> VGG:
    """VGG-13 with batch norm."""
    return VGG(B, batch_norm=True, **arguments)


@register
def vgg16(**arguments: Any) -> VGG:
    """VGG-16: 138.4 million parameters."""
    return VGG(D, **arguments)


@register
def vgg16_bn(**arguments: Any) -> VGG:
    """VGG-16 with batch norm."""
    return VGG(D, batch_norm=True, **arguments)


@register
def vgg19(**arguments: Any) -> VGG:
    """VGG-19: 143.7 million parameters."""
    return VGG(E, **arguments)


@register
def vgg19_bn(**arguments: Any) -> VGG:
    """VGG-19 with batch norm."""
    return VGG(E, batch_norm=True, **arguments)
