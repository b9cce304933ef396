"""EfficientNet (Tan & Le 2019): MobileNet's inverted residuals with squeeze-and-excitation (Hu et al. 2018), found by a
search and scaled in width, depth and image size together."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nn
from .blocks import NormLayer, conv_norm_activation, make_divisible
from .registry import register


class SqueezeExcitation(torch.nn.Module):
    """Scales each channel by a number in (0, 1) that depends on the means of all channels: ``[N, C, H, W]`` to the same
    shape."""

    def __init__(self, input_channels: int, squeeze_channels: int, layers: ModuleType) -> None:
        super().__init__()
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc1 = layers.Conv2d(input_channels, squeeze_channels, 1)
        self.activation = torch.nn.SiLU()
        self.fc2 = layers.Conv2d(squeeze_channels, input_channels, 1)
        self.scale_activation = torch.nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))  # [N, squeeze_channels, 1, 1]
        scale = self.scale_activation(self.fc2(scale))  # [N, C, 1, 1]
        return scale * x


class MBConv(torch.nn.Module):
    """1x1 convolution to ``expand_ratio`` times the channels, depthwise convolution, squeeze-and-excitation, and 1x1
    back to few channels without activation; with a skip connection and stochastic depth where input and output have
    one shape."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expand_ratio: int,
        stochastic_depth_prob: float,
        norm_layer: NormLayer,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        width = in_channels * expand_ratio
        options: dict[str, Any] = {"norm_layer": norm_layer, "layers": layers}
        modules: list[torch.nn.Module] = []
        if expand_ratio != 1:
            modules.append(conv_norm_activation(in_channels, width, 1, activation=torch.nn.SiLU, **options))
        modules += [
            conv_norm_activation(width, width, kernel_size, stride, groups=width, activation=torch.nn.SiLU, **options),
            SqueezeExcitation(width, max(1, in_channels // 4), layers),
            conv_norm_activation(width, out_channels, 1, activation=None, **options),
        ]
        self.block = torch.nn.Sequential(*modules)
        self.stochastic_depth = nn.StochasticDepth(stochastic_depth_prob, "row")
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.stochastic_depth(self.block(x)) + x if self.has_skip else self.block(x)


class Stage(NamedTuple):
    """A row of table 1, for B0."""

    expand_ratio: int
    kernel_size: int
    stride: int  # of the first block
    channels: int
    blocks: int


STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


class EfficientNet(torch.nn.Module):
    """A 3x3 convolution, seven stages of inverted residuals, a 1x1 convolution: images ``[N, 3, H, W]`` to
    ``[N, num_classes]``.

    Args:
        width_mult, depth_mult: multiply B0's channels, which are rounded to multiples of 8, and its blocks in each
            stage, which are rounded up.
        dropout: probability before the linear layer.
        stochastic_depth_prob: what the probability of leaving out a block grows to, linearly from 0 at the first.
        norm_layer: makes a norm for a number of channels; ``layers.BatchNorm2d`` unless given.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``width_mult`` or ``depth_mult`` is not positive.
    """

    def __init__(
        self,
        width_mult: float,
        depth_mult: float,
        dropout: float = 0.2,
        stochastic_depth_prob: float = 0.2,
        num_classes: int = 1000,
        norm_layer: NormLayer | None = None,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if width_mult <= 0 or depth_mult <= 0:
            raise ValueError(f"width_mult and depth_mult must be positive, got {width_mult} and {depth_mult}")
        norm_layer = norm_layer or layers.BatchNorm2d
        options: dict[str, Any] = {"activation": torch.nn.SiLU, "norm_layer": norm_layer, "layers": layers}

        in_channels = make_divisible(32 * width_mult)
        features: list[torch.nn.Module] = [conv_norm_activation(3, in_channels, stride=2, **options)]
        counts = [math.ceil(stage.blocks * depth_mult) for stage in STAGES]
        position = 0
        for stage, count in zip(STAGES, counts, strict=True):
            out_channels = make_divisible(stage.channels * width_mult)
            blocks = []
            for block in range(count):
                blocks.append(
                    MBConv(
                        in_channels,
                        out_channels,
                        stage.kernel_size,
                        stage.stride if block == 0 else 1,
                        stage.expand_ratio,
                        stochastic_depth_prob * position / sum(counts),
                        norm_layer,
                        layers,
                    )
                )
                in_channels = out_channels
                position += 1
            features.append(torch.nn.Sequential(*blocks))
        last_channels = 4 * in_channels
        features.append(conv_norm_activation(in_channels, last_channels, 1, **options))
        self.features = torch.nn.Sequential(*features)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = torch.nn.Sequential(torch.nn.Dropout(dropout), layers.Linear(last_channels, num_classes))
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
            elif isinstance(module, torch.nn.Linear):
                bound = 1 / math.sqrt(module.out_features)
                torch.nn.init.uniform_(module.weight, -bound, bound)
                torch.nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, last_channels, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, last_channels]
        return self.classifier(x)  # [N, num_classes]


# Image sizes that the widths and depths were scaled with: 224, 240, 260, 300, 380, 456, 528 and 600 pixels.


@register
def efficientnet_b0(dropout: float = 0.2, **arguments: Any) -> EfficientNet:
    """EfficientNet-B0: 5.3 million parameters."""
    return EfficientNet(1.0, 1.0, dropout, **arguments)


@register
def efficientnet_b1(dropout: float = 0.2, **arguments: Any) -> EfficientNet:
    """EfficientNet-B1: 7.8 million parameters."""
    return EfficientNet(1.0, 1.1, dropout, **arguments)


@register
def efficientnet_b2(dropout: float = 0.3, **arguments: Any) -> EfficientNet:
    """EfficientNet-B2: 9.1 million parameters."""
    return EfficientNet(1.1, 1.2, dropout, **arguments)


@register
def efficientnet_b3(dropout: float = 0.3, **arguments: Any) -> EfficientNet:
    """EfficientNet-B3: 12.2 million parameters."""
    return EfficientNet(1.2, 1.4, dropout, **arguments)


@register
def efficientnet_b4(dropout: float = 0.4, **arguments: Any) -> EfficientNet:
    """EfficientNet-B4: 19.3 million parameters."""
    return EfficientNet(1.4, 1.8, dropout, **arguments)


def _large_efficientnet(
    width_mult: float, depth_mult: float, dropout: float, *, layers: ModuleType = nn, **arguments: Any
) -> EfficientNet:
    """B5 to B7, whose norms have another epsilon and move their statistics more slowly."""
    norm_layer = partial(layers.BatchNorm2d, eps=0.001, momentum=0.01)
    return EfficientNet(width_mult, depth_mult, dropout, norm_layer=norm_layer, layers=layers, **arguments)


@register
def efficientnet_b5(dropout: float = 0.4, **arguments: Any) -> EfficientNet:
    """EfficientNet-B5: 30.4 million parameters."""
    return _large_efficientnet(1.6, 2.2, dropout, **arguments)


@register
def efficientnet_b6(dropout: float = 0.5, **arguments: Any) -> EfficientNet:
    """EfficientNet-B6: 43.0 million parameters."""
    return _large_efficientnet(1.8, 2.6, dropout, **arguments)


@register
def efficientnet_b7(dropout: float = 0.5, **arguments: Any) -> EfficientNet:
    """EfficientNet-B7: 66.3 million parameters."""
    return _large_efficientnet(2.0, 3.1, dropout, **arguments)
