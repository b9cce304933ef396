"""Autoencoders: a code of few numbers from which an image is rebuilt (Hinton & Salakhutdinov 2006).

The denoising variant (Vincent et al. 2010) sees images with noise and rebuilds them without.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import nn
from .blocks import conv_norm_activation
from .registry import register


@register
class Autoencoder(torch.nn.Module):
    """``encoder``: images ``[N, in_channels, S, S]`` to codes ``[N, code_features]``; ``decoder``: back to images.

    Convolutions of stride 2 halve the image twice; nearest neighbours double it twice, each followed by a convolution.

    Args:
        image_size: height and width S of the images, a multiple of 4.
        in_channels: channels of the images.
        code_features: size of the code.
        widths: channels after the first and the second halving.
        noise: standard deviation of what :meth:`loss` adds to the images while training; 0.0 for a plain autoencoder.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``image_size`` is not a positive multiple of 4, or ``noise`` is negative.
    """

    def __init__(
        self,
        image_size: int = 28,
        in_channels: int = 1,
        code_features: int = 32,
        widths: tuple[int, int] = (32, 64),
        noise: float = 0.0,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4 != 0:
            raise ValueError(f"image_size must be a positive multiple of 4, got {image_size}")
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.noise = noise
        narrow, wide = widths
        smallest = (wide, image_size // 4, image_size // 4)
        conv = partial(conv_norm_activation, activation=torch.nn.ReLU, norm_layer=layers.BatchNorm2d, layers=layers)
        self.encoder = torch.nn.Sequential(
            conv(in_channels, narrow, stride=2),  # [N, narrow, S/2, S/2]
            conv(narrow, wide, stride=2),  # [N, wide, S/4, S/4]
            torch.nn.Flatten(),
            layers.Linear(math.prod(smallest), code_features),
        )
        self.decoder = torch.nn.Sequential(
            layers.Linear(code_features, math.prod(smallest)),
            torch.nn.ReLU(),
            torch.nn.Unflatten(1, smallest),  # [N, wide, S/4, S/4]
            torch.nn.Upsample(scale_factor=2),
            conv(wide, narrow),  # [N, narrow, S/2, S/2]
            torch.nn.Upsample(scale_factor=2),
            layers.Conv2d(narrow, in_channels, 3, padding=1),  # [N, in_channels, S, S]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions, shaped as ``images``."""
        return self.decoder(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """Mean squared difference between ``images`` and what is rebuilt from them, with noise while training."""
        seen = images + self.noise * torch.randn_like(images) if self.training and self.noise > 0 else images
        return F.mse_loss(self(seen), images)
