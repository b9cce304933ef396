"""Residual networks: ResNet (He et al. 2016a, "Deep residual learning for image recognition"), Wide ResNet (Zagoruyko &
Komodakis 2016), ResNeXt (Xie et al. 2017), small ResNets for CIFAR (2016a, section 4.2) and pre-activation ResNets (He
et al. 2016b, "Identity mappings in deep residual networks")."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import nn
from .blocks import NormLayer
from .registry import register


def conv3x3(
    in_channels: int, out_channels: int, layers: ModuleType, stride: int = 1, groups: int = 1, dilation: int = 1
) -> torch.nn.Conv2d:
    """3x3 convolution that keeps height and width, but for ``stride``."""
    return layers.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, layers: ModuleType, stride: int = 1) -> torch.nn.Conv2d:
    """1x1 convolution."""
    return layers.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def initialize(model: torch.nn.Module) -> None:
    """Kaiming's normal initial filters (He et al. 2015), which keep the variance of the gradient."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(torch.nn.Module):
    """Two 3x3 convolutions and a skip connection (figure 5, left).

    Args:
        downsample: brings the skip connection to the shape of the output, where that is not the input's.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        downsample: torch.nn.Module | None,
        norm_layer: NormLayer,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, layers, stride)
        self.bn1 = norm_layer(channels)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = conv3x3(channels, channels, layers)
        self.bn2 = norm_layer(channels)
        self.relu2 = torch.nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = nn.norm_activation(self.bn1, self.relu1, self.conv1(x))  # [N, channels, H/stride, W/stride]
        return nn.norm_activation(self.bn2, self.relu2, self.conv2(x), identity)


class Bottleneck(torch.nn.Module):
    """1x1, 3x3 and 1x1 convolution and a skip connection (figure 5, right), with the stride in the 3x3.

    Args:
        width: channels of the 3x3 convolution.
        downsample: brings the skip connection to the shape of the output, where that is not the input's.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        width: int,
        stride: int,
        groups: int,
        dilation: int,
        downsample: torch.nn.Module | None,
        norm_layer: NormLayer,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(in_channels, width, layers)
        self.bn1 = norm_layer(width)
        self.relu1 = torch.nn.ReLU()
        self.conv2 = conv3x3(width, width, layers, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.relu2 = torch.nn.ReLU()
        self.conv3 = conv1x1(width, channels * self.expansion, layers)
        self.bn3 = norm_layer(channels * self.expansion)
        self.relu3 = torch.nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = nn.norm_activation(self.bn1, self.relu1, self.conv1(x))  # [N, width, H, W]
        x = nn.norm_activation(self.bn2, self.relu2, self.conv2(x))  # [N, width, H/stride, W/stride]
        return nn.norm_activation(self.bn3, self.relu3, self.conv3(x), identity)  # [N, 4 * channels, ...]


class ResNet(torch.nn.Module):
    """A stem and four stages of residual blocks: images ``[N, 3, H, W]`` to ``[N, num_classes]``.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: how many in each of the four stages.
        zero_init_residual: starts each block as the identity, its last norm with weights of zero.
        groups, width_per_group: of the 3x3 convolutions of bottlenecks, whose width is their product in the first stage
            and doubles with each stage after it.
        replace_stride_with_dilation: for each of the last three stages, whether it keeps the image's size and spreads
            its filters instead (bottlenecks only).
        norm_layer: makes a norm for a number of channels; ``layers.BatchNorm2d`` unless given.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``blocks`` has not four elements, ``replace_stride_with_dilation`` has not three, or a basic block
            is to have groups, another width or dilation.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or layers.BatchNorm2d
        dilate = (False, *(replace_stride_with_dilation or (False, False, False)))
        if len(blocks) != 4:
            raise ValueError(f"blocks must have 4 elements, got {blocks}")
        if len(dilate) != 4:
            raise ValueError(f"replace_stride_with_dilation must have 3 elements, got {replace_stride_with_dilation}")
        if block is BasicBlock and (groups != 1 or width_per_group != 64 or any(dilate)):
            raise ValueError(
                "basic blocks have groups=1, width_per_group=64 and no dilation, "
                f"got groups={groups}, width_per_group={width_per_group}, replace_stride_with_dilation={dilate[1:]}"
            )

        def make_block(in_channels: int, channels: int, stride: int, dilation: int) -> torch.nn.Module:
            out_channels = channels * block.expansion
            downsample = None
            if stride != 1 or in_channels != out_channels:
                projection = conv1x1(in_channels, out_channels, layers, stride)
                downsample = layers.Sequential(projection, norm_layer(out_channels))
            if block is BasicBlock:
                return BasicBlock(in_channels, channels, stride, downsample, norm_layer, layers)
            width = channels * width_per_group // 64 * groups
            return Bottleneck(in_channels, channels, width, stride, groups, dilation, downsample, norm_layer, layers)

        stages = []
        in_channels, dilation = 64, 1
        for stage, (count, spread) in enumerate(zip(blocks, dilate, strict=True)):
            channels = 64 * 2**stage
            stride = 1 if stage == 0 or spread else 2
            modules = [make_block(in_channels, channels, stride, dilation)]
            in_channels, dilation = channels * block.expansion, dilation * (2 if spread else 1)
            modules += [make_block(in_channels, channels, 1, dilation) for _ in range(1, count)]
            stages.append(torch.nn.Sequential(*modules))

        self.conv1 = layers.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = torch.nn.ReLU()
        self.maxpool = torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = layers.Linear(in_channels, num_classes)

        initialize(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    last_norm: Any = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                    torch.nn.init.zeros_(last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.norm_activation(self.bn1, self.relu, self.conv1(x))  # [N, 64, H/2, W/2]
        x = self.layer1(self.maxpool(x))  # [N, 64 * expansion, H/4, W/4]
        x = self.layer2(x)  # twice the channels and half the image in each
        x = self.layer3(x)
        x = self.layer4(x)  # [N, 512 * expansion, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, 512 * expansion]
        return self.fc(x)  # [N, num_classes]


class PaddingShortcut(torch.nn.Module):
    """A skip connection without parameters (option A of section 3.3): every other pixel, and zeros for the channels
    that are missing. ``[N, in_channels, H, W]`` to ``[N, out_channels, H/2, W/2]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.missing_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.missing_channels))


class CifarResNet(torch.nn.Module):
    """A 3x3 convolution and three stages of basic blocks with 16, 32 and 64 channels: images ``[N, 3, H, W]``, 32 x 32
    in CIFAR, to ``[N, num_classes]``.

    Args:
        depth: layers with weights on the longest path; each stage has ``(depth - 2) / 6`` blocks.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``depth`` is not 2 more than a positive multiple of 6.
    """

    def __init__(self, depth: int, num_classes: int = 10, *, layers: ModuleType = nn) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 2 more than a positive multiple of 6, got {depth}")
        stages = []
        in_channels = 16
        for channels in (16, 32, 64):
            stride, shortcut = (1, None) if channels == 16 else (2, PaddingShortcut(in_channels, channels))
            modules = [BasicBlock(in_channels, channels, stride, shortcut, layers.BatchNorm2d, layers)]
            for _ in range(1, (depth - 2) // 6):
                modules.append(BasicBlock(channels, channels, 1, None, layers.BatchNorm2d, layers))
            stages.append(torch.nn.Sequential(*modules))
            in_channels = channels

        self.conv1 = conv3x3(3, 16, layers)
        self.bn1 = layers.BatchNorm2d(16)
        self.relu = torch.nn.ReLU()
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = layers.Linear(64, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.norm_activation(self.bn1, self.relu, self.conv1(x))  # [N, 16, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))  # [N, 64, H/4, W/4]
        x = self.avgpool(x).flatten(1)  # [N, 64]
        return self.fc(x)  # [N, num_classes]


class PreActivationBlock(torch.nn.Module):
    """Convolutions with norm and ReLU before each, and a skip connection whose sum nothing is applied to (2016b, figure
    4e): ``[N, in_channels, H, W]`` to ``[N, widths[-1], H/stride, W/stride]``.

    Args:
        widths: channels of each convolution's output: two 3x3 for a basic block; 1x1, 3x3 and 1x1 for a bottleneck.
        is_first: whether this is the network's first block, whose input the stem has normalised and rectified.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], stride: int, is_first: bool, layers: ModuleType
    ) -> None:
        super().__init__()
        before = [] if is_first else [layers.BatchNorm2d(in_channels), torch.nn.ReLU()]
        if len(widths) == 2:
            convolutions = [
                conv3x3(in_channels, widths[0], layers, stride),
                conv3x3(widths[0], widths[1], layers),
            ]
        else:
            convolutions = [
                conv1x1(in_channels, widths[0], layers),
                conv3x3(widths[0], widths[1], layers, stride),
                conv1x1(widths[1], widths[2], layers),
            ]
        branch: list[torch.nn.Module] = [convolutions[0]]
        for convolution in convolutions[1:]:
            branch += [layers.BatchNorm2d(convolution.in_channels), torch.nn.ReLU(), convolution]
        self.activated = layers.Sequential(*before)
        self.branch = layers.Sequential(*branch)
        changes_shape = stride != 1 or in_channels != widths[-1]
        self.downsample = conv1x1(in_channels, widths[-1], layers, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activated(x)
        identity = x if self.downsample is None else self.downsample(activated)
        return self.branch(activated) + identity


class PreActivationResNet(torch.nn.Module):
    """A stem and four stages of pre-activation blocks: images ``[N, 3, H, W]`` to ``[N, num_classes]``.

    Args:
        bottleneck: whether blocks are bottlenecks, four times as wide at their ends, rather than basic blocks.
        blocks: how many in each of the four stages.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self, bottleneck: bool, blocks: Sequence[int], num_classes: int = 1000, *, layers: ModuleType = nn
    ) -> None:
        super().__init__()
        features = [
            layers.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),
            layers.BatchNorm2d(64),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        ]
        in_channels = 64
        for stage, count in enumerate(blocks):
            channels = 64 * 2**stage
            widths = (channels, channels, 4 * channels) if bottleneck else (channels, channels)
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                is_first = stage == 0 and index == 0
                features.append(PreActivationBlock(in_channels, widths, stride, is_first, layers))
                in_channels = widths[-1]
        self.features = layers.Sequential(*features, layers.BatchNorm2d(in_channels), torch.nn.ReLU())
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = layers.Linear(in_channels, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, channels, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, channels]
        return self.fc(x)  # [N, num_classes]


@register
def resnet18(**arguments: Any) -> ResNet:
    """ResNet-18: 11.7 million parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **arguments)


@register
def resnet34(**arguments: Any) -> ResNet:
    """ResNet-34: 21.8 million parameters."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **arguments)


@register
def resnet50(**arguments: Any) -> ResNet:
    """ResNet-50: 25.6 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **arguments)


@register
def resnet101(**arguments: Any) -> ResNet:
    """ResNet-101: 44.5 million parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **arguments)


@register
def resnet152(**arguments: Any) -> ResNet:
    """ResNet-152: 60.2 million parameters."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **arguments)


@register
def wide_resnet50_2(**arguments: Any) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide: 68.9 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width_per_group=128, **arguments)


@register
def wide_resnet101_2(**arguments: Any) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide: 126.9 million parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), width_per_group=128, **arguments)


@register
def resnext50_32x4d(**arguments: Any) -> ResNet:
    """ResNeXt-50 of 32 groups, 4 channels wide: 25.0 million parameters."""
    return ResNet(Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4, **arguments)


@register
def resnext101_32x8d(**arguments: Any) -> ResNet:
    """ResNeXt-101 of 32 groups, 8 channels wide: 88.8 million parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8, **arguments)


@register
def resnext101_64x4d(**arguments: Any) -> ResNet:
    """ResNeXt-101 of 64 groups, 4 channels wide: 83.5 million parameters."""
    return ResNet(Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4, **arguments)


@register
def resnet20(**arguments: Any) -> CifarResNet:
    """ResNet-20 for CIFAR: 0.27 million parameters."""
    return CifarResNet(20, **arguments)


@register
def resnet32(**arguments: Any) -> CifarResNet:
    """ResNet-32 for CIFAR: 0.46 million parameters."""
    return CifarResNet(32, **arguments)


@register
def resnet44(**arguments: Any) -> CifarResNet:
    """ResNet-44 for CIFAR: 0.66 million parameters."""
    return CifarResNet(44, **arguments)


@register
def resnet56(**arguments: Any) -> CifarResNet:
    """ResNet-56 for CIFAR: 0.85 million parameters."""
    return CifarResNet(56, **arguments)


@register
def resnet110(**arguments: Any) -> CifarResNet:
    """ResNet-110 for CIFAR: 1.7 million parameters."""
    return CifarResNet(110, **arguments)


@register
def preact_resnet18(**arguments: Any) -> PreActivationResNet:
    """Pre-activation ResNet-18: 11.7 million parameters."""
    return PreActivationResNet(False, (2, 2, 2, 2), **arguments)


@register
def preact_resnet50(**arguments: Any) -> PreActivationResNet:
    """Pre-activation ResNet-50: 25.5 million parameters."""
    return PreActivationResNet(True, (3, 4, 6, 3), **arguments)
