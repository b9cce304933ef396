"""MobileNets, whose 3x3 convolutions see each channel alone (depthwise) and leave mixing channels to 1x1 convolutions:
version 1 (Howard et al. 2017) and version 2 with inverted residuals (Sandler et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .blocks import NormLayer, conv_norm_activation, make_divisible
from .registry import register


def initialize(model: torch.nn.Module) -> None:
    """Kaiming's normal initial filters, and small initial weights of the linear layer."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.01)
            torch.nn.init.zeros_(module.bias)


# Channels and stride of each depthwise separable convolution: version 1, table 1.
SEPARABLE_CONVOLUTIONS = (
    ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)) + 5 * ((512, 1),) + ((1024, 2), (1024, 1))
)


class MobileNetV1(torch.nn.Module):
    """A 3x3 convolution and thirteen depthwise separable ones: images ``[N, 3, H, W]`` to ``[N, num_classes]``.

    Args:
        width_mult: multiplies the channels of every layer, which are rounded to multiples of 8.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``width_mult`` is not positive.
    """

    def __init__(self, num_classes: int = 1000, width_mult: float = 1.0, *, layers: ModuleType = nn) -> None:
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"width_mult must be positive, got {width_mult}")

        def block(
            in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
        ) -> torch.nn.Sequential:
            return conv_norm_activation(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                groups,
                activation=torch.nn.ReLU,
                norm_layer=layers.BatchNorm2d,
                layers=layers,
            )

        in_channels = make_divisible(32 * width_mult)
        features = [block(3, in_channels, 3, stride=2)]
        for channels, stride in SEPARABLE_CONVOLUTIONS:
            out_channels = make_divisible(channels * width_mult)
            features.append(block(in_channels, in_channels, 3, stride, groups=in_channels))  # depthwise
            features.append(block(in_channels, out_channels, 1))  # pointwise
            in_channels = out_channels
        self.features = torch.nn.Sequential(*features)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.Linear(in_channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, channels, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, channels]
        return self.classifier(x)  # [N, num_classes]


class InvertedResidual(torch.nn.Module):
    """1x1 convolution to ``expand_ratio`` times the channels, depthwise 3x3, and 1x1 back to few channels without
    activation (the linear bottleneck), with a skip connection where input and output have one shape."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expand_ratio: int,
        norm_layer: NormLayer,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        width = in_channels * expand_ratio
        options: dict[str, Any] = {"activation": torch.nn.ReLU6, "norm_layer": norm_layer, "layers": layers}
        modules: list[torch.nn.Module] = []
        if expand_ratio != 1:
            modules.append(conv_norm_activation(in_channels, width, 1, **options))
        modules += [
            conv_norm_activation(width, width, 3, stride, groups=width, **options),
            layers.Conv2d(width, out_channels, 1, bias=False),
            norm_layer(out_channels),
        ]
        self.conv = layers.Sequential(*modules)
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_skip else self.conv(x)


# Expansion, channels, number of blocks and stride of the first, stage by stage: version 2, table 2.
INVERTED_RESIDUALS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(torch.nn.Module):
    """A 3x3 convolution, stages of inverted residuals, a 1x1 convolution: images ``[N, 3, H, W]`` to
    ``[N, num_classes]``.

    Args:
        width_mult: multiplies the channels of every layer, of the last only if above 1.
        inverted_residual_setting: expansion, channels, blocks and stride of each stage, table 2 unless given.
        round_nearest: what all numbers of channels are rounded to multiples of.
        norm_layer: makes a norm for a number of channels; ``layers.BatchNorm2d`` unless given.
        dropout: probability before the linear layer.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``width_mult`` is not positive, or a stage has not four numbers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        norm_layer: NormLayer | None = None,
        dropout: float = 0.2,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        setting = INVERTED_RESIDUALS if inverted_residual_setting is None else inverted_residual_setting
        if width_mult <= 0:
            raise ValueError(f"width_mult must be positive, got {width_mult}")
        if any(len(stage) != 4 for stage in setting):
            raise ValueError(f"inverted_residual_setting must have 4 numbers a stage, got {setting}")
        norm_layer = norm_layer or layers.BatchNorm2d
        options: dict[str, Any] = {"activation": torch.nn.ReLU6, "norm_layer": norm_layer, "layers": layers}

        in_channels = make_divisible(32 * width_mult, round_nearest)
        features: list[torch.nn.Module] = [conv_norm_activation(3, in_channels, stride=2, **options)]
        for expand_ratio, channels, blocks, first_stride in setting:
            out_channels = make_divisible(channels * width_mult, round_nearest)
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                features.append(InvertedResidual(in_channels, out_channels, stride, expand_ratio, norm_layer, layers))
                in_channels = out_channels
        last_channels = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        features.append(conv_norm_activation(in_channels, last_channels, 1, **options))
        self.features = torch.nn.Sequential(*features)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Sequential(torch.nn.Dropout(dropout), layers.Linear(last_channels, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, last_channels, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, last_channels]
        return self.classifier(x)  # [N, num_classes]


@register
def mobilenet_v1(**arguments: Any) -> MobileNetV1:
    """MobileNet version 1: 4.2 million parameters."""
    return MobileNetV1(**arguments)


@register
def mobilenet_v2(**arguments: Any) -> MobileNetV2:
    """MobileNet version 2: 3.5 million parameters."""
    return MobileNetV2(**arguments)
