"""LeNet-5 (LeCun et al. 1998, section II.B), and the same with batch normalisation (Ioffe & Szegedy 2015)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .registry import register


@register
class LeNet5(torch.nn.Module):
    """LeNet-5 as it is taught: images ``[N, in_channels, S, S]`` to logits ``[N, num_classes]``; 61,706 parameters.

    Hyperbolic tangents and average pooling as in LeCun et al. 1998. Dropped since then: trainable coefficients of the
    pooling, a second convolution that sees only some of the maps, and Gaussian connections at the end.

    Args:
        image_size: height and width S of the images, 32, or 28, which are padded to 32.
        in_channels: channels of the images.
        num_classes: classes to tell apart.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``image_size`` is neither 28 nor 32.
    """

    def __init__(
        self, image_size: int = 32, in_channels: int = 1, num_classes: int = 10, layers: ModuleType = nn
    ) -> None:
        super().__init__()
        if image_size not in (28, 32):
            raise ValueError(f"image_size must be 28 or 32, got {image_size}")
        self.features = torch.nn.Sequential(
            layers.Conv2d(in_channels, 6, kernel_size=5, padding=(32 - image_size) // 2),  # [N, 6, 28, 28]
            torch.nn.Tanh(),
            torch.nn.AvgPool2d(2),  # [N, 6, 14, 14]
            layers.Conv2d(6, 16, kernel_size=5),  # [N, 16, 10, 10]
            torch.nn.Tanh(),
            torch.nn.AvgPool2d(2),  # [N, 16, 5, 5]
        )
        self.classifier = torch.nn.Sequential(
            layers.Linear(16 * 5 * 5, 120),
            torch.nn.Tanh(),
            layers.Linear(120, 84),
            torch.nn.Tanh(),
            layers.Linear(84, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)  # [N, 400]
        return self.classifier(x)  # [N, num_classes]


class ConvBlock(torch.nn.Module):
    """5x5 convolution, batch norm, ReLU, and a 2x2 maximum that halves height and width."""

    def __init__(self, in_channels: int, out_channels: int, layers: ModuleType) -> None:
        super().__init__()
        # No bias: batch norm subtracts the mean, and any bias with it.
        self.conv = layers.Conv2d(in_channels, out_channels, kernel_size=5, padding=2, bias=False)
        self.norm = layers.BatchNorm2d(out_channels)
        self.activation = torch.nn.ReLU()
        self.pool = torch.nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.norm_activation(self.norm, self.activation, self.conv(x))  # [N, out, H, W]
        return self.pool(x)  # [N, out, H/2, W/2]


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
