"""DenseNet-BC (Huang et al. 2017): each layer reads the concatenated outputs of all layers before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import nn
from .registry import register


class DenseLayer(torch.nn.Module):
    """Norm, ReLU, 1x1 convolution to ``bn_size * growth_rate`` channels; norm, ReLU, 3x3 to ``growth_rate``."""

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.norm1 = layers.BatchNorm2d(in_channels)
        self.relu1 = torch.nn.ReLU()
        self.conv1 = layers.Conv2d(in_channels, bn_size * growth_rate, kernel_size=1, bias=False)
        self.norm2 = layers.BatchNorm2d(bn_size * growth_rate)
        self.relu2 = torch.nn.ReLU()
        self.conv2 = layers.Conv2d(bn_size * growth_rate, growth_rate, kernel_size=3, padding=1, bias=False)
        self.dropout = torch.nn.Dropout(drop_rate)
        self.memory_efficient = memory_efficient

    def bottleneck(self, *features: Tensor) -> Tensor:
        x = torch.cat(features, 1)  # [N, in, H, W]
        return self.conv1(nn.norm_activation(self.norm1, self.relu1, x))  # [N, bn_size * growth_rate, H, W]

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.memory_efficient and self.training:
            x = checkpoint(self.bottleneck, *features, use_reentrant=False)
        else:
            x = self.bottleneck(*features)
        x = self.conv2(nn.norm_activation(self.norm2, self.relu2, x))  # [N, growth_rate, H, W]
        return self.dropout(x)


class DenseBlock(torch.nn.ModuleDict):
    """Dense layers ``denselayer1``, ``denselayer2``...; returns its input and all that they add, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(torch.nn.Module):
    """Four dense blocks, between them 1x1 convolutions that halve the channels and averages that halve the image:
    images ``[N, 3, H, W]``, 29 x 29 at least, to ``[N, num_classes]``.

    Args:
        growth_rate: channels that each layer adds.
        block_config: layers of each block.
        num_init_features: channels of the first convolution.
        bn_size: channels between the two convolutions of a layer, as a multiple of ``growth_rate``.
        drop_rate: probability of dropout after each layer.
        memory_efficient: keeps no concatenation for the backward pass but computes it again (Pleiss et al. 2017), which
            moves the running statistics of its norm a second time.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        channels = num_init_features
        features: OrderedDict[str, torch.nn.Module] = OrderedDict(
            conv0=layers.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False),
            norm0=layers.BatchNorm2d(channels),
            relu0=torch.nn.ReLU(),
            pool0=torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        for block, num_layers in enumerate(block_config, start=1):
            if block > 1:
                features[f"transition{block - 1}"] = transition(channels, channels // 2, layers)
                channels //= 2
            dense_block = DenseBlock()
            for layer in range(1, num_layers + 1):
                dense_block[f"denselayer{layer}"] = DenseLayer(
                    channels, growth_rate, bn_size, drop_rate, memory_efficient, layers
                )
                channels += growth_rate
            features[f"denseblock{block}"] = dense_block
        features["norm5"] = layers.BatchNorm2d(channels)
        features["relu5"] = torch.nn.ReLU()
        self.features = layers.Sequential(features)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, torch.nn.Linear):
                torch.nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, channels, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, channels]
        return self.classifier(x)  # [N, num_classes]


def transition(in_channels: int, out_channels: int, layers: ModuleType) -> torch.nn.Sequential:
    """``[N, in, H, W]`` to ``[N, out, H/2, W/2]``."""
    return layers.Sequential(
        OrderedDict(
            norm=layers.BatchNorm2d(in_channels),
            relu=torch.nn.ReLU(),
            conv=layers.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
            pool=torch.nn.AvgPool2d(kernel_size=2),
        )
    )


@register
def densenet121(**arguments: Any) -> DenseNet:
    """DenseNet-121: 8.0 million parameters."""
    return DenseNet(32, (6, 12, 24, 16), 64, **arguments)


@register
def densenet161(**arguments: Any) -> DenseNet:
    """DenseNet-161: 28.7 million parameters."""
    return DenseNet(48, (6, 12, 36, 24), 96, **arguments)


@register
def densenet169(**arguments: Any) -> DenseNet:
    """DenseNet-169: 14.1 million parameters."""
    return DenseNet(32, (6, 12, 32, 32), 64, **arguments)


@register
def densenet201(**arguments: Any) -> DenseNet:
    """DenseNet-201: 20.0 million parameters."""
    return DenseNet(32, (6, 12, 48, 32), 64, **arguments)
