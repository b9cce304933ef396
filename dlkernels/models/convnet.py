"""The smallest convolutional classifier: one convolution and two linear layers (after LeCun et al. 1989)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .registry import register


@register
class ThreeLayerConvNet(torch.nn.Module):
    """Convolution, ReLU, 2x2 maximum, linear, ReLU, linear: images ``[N, in_channels, S, S]`` to ``[N, num_classes]``.

    Args:
        image_size: height and width S of the images, even.
        in_channels: channels of the images.
        num_classes: classes to tell apart.
        num_filters: channels of the convolution.
        kernel_size: its filters' height and width, odd, so that the padding keeps the size of the image.
        hidden_features: size of the hidden linear layer.
        batch_norm: batch normalisation before both ReLUs.
        fractional_pooling: what share of the image's height and width the maximum leaves, over 2x2 pixels at random
            distances (fractional max pooling, Graham 2014), also in evaluation; the halving maximum if not given.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``image_size`` is odd or not positive, ``kernel_size`` even, or ``fractional_pooling`` outside
            [0.5, 1).
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        num_filters: int = 32,
        kernel_size: int = 7,
        hidden_features: int = 100,
        batch_norm: bool = False,
        fractional_pooling: float | None = None,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if image_size < 2 or image_size % 2 != 0:
            raise ValueError(f"image_size must be positive and even, got {image_size}")
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        share = 0.5 if fractional_pooling is None else fractional_pooling
        if not 0.5 <= share < 1:
            raise ValueError(f"fractional_pooling must be in [0.5, 1), got {fractional_pooling}")
        size = int(share * image_size)  # after pooling
        # No bias before batch norm, which subtracts the mean, and any bias with it.
        bias = not batch_norm
        self.conv = layers.Conv2d(in_channels, num_filters, kernel_size, padding=kernel_size // 2, bias=bias)
        self.conv_norm = layers.BatchNorm2d(num_filters) if batch_norm else torch.nn.Identity()
        self.conv_activation = torch.nn.ReLU()
        self.pool = torch.nn.MaxPool2d(2) if fractional_pooling is None else torch.nn.FractionalMaxPool2d(2, size)
        self.hidden = layers.Linear(num_filters * size**2, hidden_features, bias=bias)
        self.hidden_norm = layers.BatchNorm1d(hidden_features) if batch_norm else torch.nn.Identity()
        self.hidden_activation = torch.nn.ReLU()
        self.scores = layers.Linear(hidden_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.norm_activation(self.conv_norm, self.conv_activation, self.conv(x))  # [N, num_filters, S, S]
        x = self.pool(x).flatten(1)  # [N, num_filters * S/2 * S/2], or what fractional pooling leaves
        x = nn.norm_activation(self.hidden_norm, self.hidden_activation, self.hidden(x))  # [N, hidden_features]
        return self.scores(x)  # [N, num_classes]
