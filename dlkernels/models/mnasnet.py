"""MnasNet-B1 (Tan et al. 2019, without squeeze-and-excitation): inverted residuals whose kernel sizes, widths and
depths were found by a search that rewards accuracy and speed on a phone."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .blocks import make_divisible
from .registry import register

MOMENTUM = 1 - 0.9997  # of the running statistics, which takes some ten thousand steps


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, layers: ModuleType, stride: int = 1, groups: int = 1
) -> list[torch.nn.Module]:
    """Convolution padded to divide height and width by ``stride`` alone, and batch norm."""
    return [
        layers.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        layers.BatchNorm2d(out_channels),
    ]


class InvertedResidual(torch.nn.Module):
    """1x1 convolution to ``expansion`` times the channels, depthwise convolution, and 1x1 back to few channels without
    activation, with a skip connection where input and output have one shape."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int, layers: ModuleType
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.layers = layers.Sequential(
            *conv_norm(in_channels, width, 1, layers),
            torch.nn.ReLU(),
            *conv_norm(width, width, kernel_size, layers, stride, groups=width),
            torch.nn.ReLU(),
            *conv_norm(width, out_channels, 1, layers),
        )
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.has_skip else self.layers(x)


# Channels, kernel size, stride of the first block, expansion and number of blocks, stage by stage.
STAGES = (
    (24, 3, 2, 3, 3),
    (40, 5, 2, 3, 3),
    (80, 5, 2, 6, 3),
    (96, 3, 1, 6, 2),
    (192, 5, 2, 6, 4),
    (320, 3, 1, 6, 1),
)


class MNASNet(torch.nn.Module):
    """A depthwise separable stem, six stages of inverted residuals, a 1x1 convolution: images ``[N, 3, H, W]`` to
    ``[N, num_classes]``.

    Args:
        alpha: multiplies the channels of every layer but the last.
        dropout: probability before the linear layer.
        momentum: share of a batch in the running statistics; short runs want more than the default.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``alpha`` is not positive.
    """

    _version = 2  # of torchvision's state_dict; in the first, alpha left the stem as it was

    def __init__(
        self,
        alpha: float,
        num_classes: int = 1000,
        dropout: float = 0.2,
        momentum: float = MOMENTUM,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        stem_channels, in_channels = make_divisible(32 * alpha), make_divisible(16 * alpha)
        modules = [
            *conv_norm(3, stem_channels, 3, layers, stride=2),
            torch.nn.ReLU(),
            *conv_norm(stem_channels, stem_channels, 3, layers, groups=stem_channels),
            torch.nn.ReLU(),
            *conv_norm(stem_channels, in_channels, 1, layers),
        ]
        for channels, kernel_size, first_stride, expansion, count in STAGES:
            blocks = []
            for block in range(count):
                stride, out_channels = first_stride if block == 0 else 1, make_divisible(channels * alpha)
                blocks.append(InvertedResidual(in_channels, out_channels, kernel_size, stride, expansion, layers))
                in_channels = out_channels
            modules.append(torch.nn.Sequential(*blocks))
        self.layers = layers.Sequential(*modules, *conv_norm(in_channels, 1280, 1, layers), torch.nn.ReLU())
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Sequential(torch.nn.Dropout(dropout), layers.Linear(1280, num_classes))

        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = momentum
            elif isinstance(module, torch.nn.Linear):
                torch.nn.init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
                torch.nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)  # [N, 1280, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, 1280]
        return self.classifier(x)  # [N, num_classes]


@register
def mnasnet0_5(**arguments: Any) -> MNASNet:
    """MnasNet of half the width: 2.2 million parameters."""
    return MNASNet(0.5, **arguments)


@register
def mnasnet0_75(**arguments: Any) -> MNASNet:
    """MnasNet of three quarters of the width: 3.2 million parameters."""
    return MNASNet(0.75, **arguments)


@register
def mnasnet1_0(**arguments: Any) -> MNASNet:
    """MnasNet: 4.4 million parameters."""
    return MNASNet(1.0, **arguments)


@register
def mnasnet1_3(**arguments: Any) -> MNASNet:
    """MnasNet of 1.3 times the width: 6.3 million parameters."""
    return MNASNet(1.3, **arguments)
