"""GoogLeNet (Szegedy et al. 2015, "Going deeper with convolutions"), with batch normalisation after each convolution
and 3x3 filters where the paper has 5x5, as in the weights that torchvision has."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import nn
from .registry import register


class GoogLeNetOutputs(NamedTuple):
    """What a GoogLeNet with auxiliary heads returns in training, each ``[N, num_classes]``. The paper adds the loss of
    each head, times 0.3, to that of the logits."""

    logits: Tensor
    aux_logits2: Tensor
    aux_logits1: Tensor


class BasicConv2d(torch.nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, layers: ModuleType, **arguments: int) -> None:
        super().__init__()
        self.conv = layers.Conv2d(in_channels, out_channels, bias=False, **arguments)
        self.bn = layers.BatchNorm2d(out_channels, eps=0.001)
        self.relu = torch.nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return nn.norm_activation(self.bn, self.relu, self.conv(x))


class Inception(torch.nn.Module):
    """Four views of one image, concatenated (figure 2b): 1x1; 1x1 then 3x3, twice; 3x3 maximum then 1x1.

    Args:
        channels_1x1: of the first branch.
        reduced_2, channels_2: of the second branch, between its convolutions and after them.
        reduced_3, channels_3: likewise of the third, which stands for the paper's 5x5.
        channels_pool: of the fourth branch.
    """

    def __init__(
        self,
        in_channels: int,
        channels_1x1: int,
        reduced_2: int,
        channels_2: int,
        reduced_3: int,
        channels_3: int,
        channels_pool: int,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(in_channels, channels_1x1, layers, kernel_size=1)
        self.branch2 = torch.nn.Sequential(
            BasicConv2d(in_channels, reduced_2, layers, kernel_size=1),
            BasicConv2d(reduced_2, channels_2, layers, kernel_size=3, padding=1),
        )
        self.branch3 = torch.nn.Sequential(
            BasicConv2d(in_channels, reduced_3, layers, kernel_size=1),
            BasicConv2d(reduced_3, channels_3, layers, kernel_size=3, padding=1),
        )
        self.branch4 = torch.nn.Sequential(
            torch.nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            BasicConv2d(in_channels, channels_pool, layers, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class InceptionAux(torch.nn.Module):
    """A classifier half-way, whose loss brings a gradient to the early layers (section 5): ``[N, in_channels, H, W]``
    to ``[N, num_classes]``."""

    def __init__(self, in_channels: int, num_classes: int, dropout: float, layers: ModuleType) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, layers, kernel_size=1)
        self.fc1 = layers.Linear(128 * 4 * 4, 1024)
        self.relu = torch.nn.ReLU()
        self.fc2 = layers.Linear(1024, num_classes)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 4)  # [N, in_channels, 4, 4]
        x = self.conv(x).flatten(1)  # [N, 2048]
        x = self.dropout(self.relu(self.fc1(x)))
        return self.fc2(x)


class GoogLeNet(torch.nn.Module):
    """Nine inceptions: images ``[N, 3, H, W]``, 15 x 15 at least, to ``[N, num_classes]``, and to
    :class:`GoogLeNetOutputs` in training with ``aux_logits``.

    Args:
        aux_logits: whether there are auxiliary heads.
        transform_input: whether images come normalised by ImageNet's mean and deviation, and are to be scaled to
            [-1, 1], as the weights that torchvision has want them.
        init_weights: initial weights of standard deviation 0.01, rather than torch's.
        dropout, dropout_aux: probability before the last linear layer, of the network and of the auxiliary heads.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        dropout: float = 0.2,
        dropout_aux: float = 0.7,
        *,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.aux_logits = aux_logits
        self.transform_input = transform_input

        self.conv1 = BasicConv2d(3, 64, layers, kernel_size=7, stride=2, padding=3)
        self.maxpool1 = torch.nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = BasicConv2d(64, 64, layers, kernel_size=1)
        self.conv3 = BasicConv2d(64, 192, layers, kernel_size=3, padding=1)
        self.maxpool2 = torch.nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32, layers)
        self.inception3b = Inception(256, 128, 128, 192, 32, 96, 64, layers)
        self.maxpool3 = torch.nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64, layers)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64, layers)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64, layers)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64, layers)
        self.inception4e = Inception(528, 256, 160, 320, 32, 128, 128, layers)
        self.maxpool4 = torch.nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128, layers)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128, layers)
        if aux_logits:
            self.aux1 = InceptionAux(512, num_classes, dropout_aux, layers)
            self.aux2 = InceptionAux(528, num_classes, dropout_aux, layers)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.dropout = torch.nn.Dropout(dropout)
        self.fc = layers.Linear(1024, num_classes)

        if init_weights:
            for module in self.modules():
                if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                    torch.nn.init.trunc_normal_(module.weight, std=0.01, a=-2, b=2)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        with_aux = self.training and self.aux_logits
        if self.transform_input:
            x = scaled_to_unit(x)
        x = self.maxpool1(self.conv1(x))  # [N, 64, H/4, W/4]
        x = self.maxpool2(self.conv3(self.conv2(x)))  # [N, 192, H/8, W/8]
        x = self.maxpool3(self.inception3b(self.inception3a(x)))  # [N, 480, H/16, W/16]
        x = self.inception4a(x)
        aux1 = self.aux1(x) if with_aux else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if with_aux else None
        x = self.maxpool4(self.inception4e(x))  # [N, 832, H/32, W/32]
        x = self.inception5b(self.inception5a(x))  # [N, 1024, H/32, W/32]
        x = self.avgpool(x).flatten(1)  # [N, 1024]
        logits = self.fc(self.dropout(x))  # [N, num_classes]
        return logits if aux1 is None or aux2 is None else GoogLeNetOutputs(logits, aux2, aux1)


def scaled_to_unit(x: Tensor) -> Tensor:
    """Images ``[N, 3, H, W]`` normalised by ImageNet's mean and deviation, scaled to [-1, 1] instead."""
    mean = x.new_tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    deviation = x.new_tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    return (x * deviation + mean - 0.5) / 0.5


@register
def googlenet(**arguments: Any) -> GoogLeNet:
    """GoogLeNet: 13.0 million parameters, 6.6 million of them without the auxiliary heads."""
    return GoogLeNet(**arguments)
