"""LeNet-5 (LeCun et al. 1998, section II.B) with batch normalisation (Ioffe & Szegedy 2015) after each convolution."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import nn
from .registry import register


class ConvBlock(torch.nn.Module):
    """5x5 convolution, batch norm, ReLU, and a 2x2 maximum that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, layers: ModuleType) -> None:
        super().__init__()
        # No bias: batch norm subtracts the mean, and any bias with it.
        self.conv = layers.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False)
        self.norm = layers.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # [N, out, H, W]
        x = F.relu(self.norm(x))
        return F.max_pool2d(x, 2)  # [N, out, H/2, W/2]


@register
class LeNet(torch.nn.Module):
    """Two convolution blocks and three linear layers: images ``[N, in_channels, S, S]`` to logits ``[N, num_classes]``.

    Args:
        image_size: height and width of the images, a multiple of 4; 8 for scikit-learn's digits, 28 for MNIST.
        widths: channels of the two blocks; LeNet-5 had (6, 16).
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``. Parameters and their
            initial values are the same.

    Raises:
        ValueError: ``image_size`` is not a positive multiple of 4.
    """

    def __init__(
        self,
        image_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: tuple[int, int] = (16, 32),
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4 != 0:
            raise ValueError(f"image_size must be a positive multiple of 4, got {image_size}")
        self.features = torch.nn.Sequential(
            ConvBlock(in_channels, widths[0], layers),
            ConvBlock(widths[0], widths[1], layers),
        )
        self.classifier = torch.nn.Sequential(
            layers.Linear(widths[1] * (image_size // 4) ** 2, 120),
            torch.nn.ReLU(),
            layers.Linear(120, 84),
            torch.nn.ReLU(),
            layers.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [N, widths[1], S/4, S/4]
        x = x.flatten(1)  # [N, widths[1] * S/4 * S/4]
        return self.classifier(x)  # [N, num_classes]
