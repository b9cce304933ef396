"""Generative adversarial networks (Goodfellow et al. 2014), convolutional as in DCGAN (Radford et al. 2016).

Where DCGAN's generator has transposed convolutions, nearest neighbours double the image and a convolution follows: no
checkerboard patterns (Odena et al. 2016). Its hyperbolic tangent at the end is left out, so that images need not lie
between -1 and 1 (as in Karras et al. 2018).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import nn
from .registry import register


def generator(
    image_size: int, out_channels: int, latent_features: int, widths: tuple[int, int], layers: ModuleType
) -> torch.nn.Sequential:
    """Noise ``[N, latent_features]`` to images ``[N, out_channels, S, S]``."""
    narrow, wide = widths
    smallest = (wide, image_size // 4, image_size // 4)
    return layers.Sequential(
        layers.Linear(latent_features, math.prod(smallest), bias=False),
        torch.nn.Unflatten(1, smallest),  # [N, wide, S/4, S/4]
        layers.BatchNorm2d(wide),
        torch.nn.ReLU(),
        torch.nn.Upsample(scale_factor=2),
        layers.Conv2d(wide, narrow, 3, padding=1, bias=False),  # [N, narrow, S/2, S/2]
        layers.BatchNorm2d(narrow),
        torch.nn.ReLU(),
        torch.nn.Upsample(scale_factor=2),
        layers.Conv2d(narrow, out_channels, 3, padding=1),  # [N, out_channels, S, S]
    )


def discriminator(
    image_size: int, in_channels: int, widths: tuple[int, int], layers: ModuleType
) -> torch.nn.Sequential:
    """Images ``[N, in_channels, S, S]`` to logits ``[N, 1]`` of their being real."""
    narrow, wide = widths
    return layers.Sequential(
        layers.Conv2d(in_channels, narrow, 4, stride=2, padding=1),  # [N, narrow, S/2, S/2]
        torch.nn.LeakyReLU(0.2),
        layers.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False),  # [N, wide, S/4, S/4]
        layers.BatchNorm2d(wide),
        torch.nn.LeakyReLU(0.2),
        torch.nn.Flatten(),
        layers.Linear(wide * (image_size // 4) ** 2, 1),
    )


@register
class GAN(torch.nn.Module):
    """A generator and a discriminator, whose losses two optimisers lower in turns.

    Args:
        image_size: height and width S of the images, a multiple of 4.
        in_channels: channels of the images.
        latent_features: size of the noise that an image is made from.
        widths: channels at S/2 and at S/4.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``image_size`` is not a positive multiple of 4.
    """

    def __init__(
        self,
        image_size: int = 28,
        in_channels: int = 1,
        latent_features: int = 64,
        widths: tuple[int, int] = (64, 128),
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if image_size < 4 or image_size % 4 != 0:
            raise ValueError(f"image_size must be a positive multiple of 4, got {image_size}")
        self.latent_features = latent_features
        self.generator = generator(image_size, in_channels, latent_features, widths, layers)
        self.discriminator = discriminator(image_size, in_channels, widths, layers)
        for module in self.modules():  # DCGAN's initial values
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def latent(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Normal noise ``[n, latent_features]`` for ``n`` images, of the type and on the device of the weights."""
        weight = next(self.generator.parameters())
        return torch.randn(n, self.latent_features, dtype=weight.dtype, device=weight.device, generator=generator)

    def forward(self, latent: Tensor) -> Tensor:
        """Noise ``[N, latent_features]`` to images ``[N, in_channels, S, S]``."""
        return self.generator(latent)

    def generator_loss(self, n: int) -> Tensor:
        """-log D(G(z)), averaged over ``n`` images: the non-saturating loss (section 3 of Goodfellow et al.).

        The discriminator gets gradients too; only the generator's parameters are to be stepped.
        """
        return F.softplus(-self.discriminator(self.generator(self.latent(n)))).mean()

    def discriminator_loss(self, images: Tensor) -> Tensor:
        """-log D(x) - log(1 - D(G(z))), averaged over ``images`` x and as many generated ones; 2 log 2 for a coin."""
        with torch.no_grad():
            generated = self.generator(self.latent(images.shape[0]))
        real, fake = self.discriminator(images), self.discriminator(generated)  # apart: each with its own statistics
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` images ``[n, in_channels, S, S]``, made with the running statistics of batch norm.

        Args:
            n: how many.
            generator: where the noise comes from; torch's default if not given.
        """
        training = self.generator.training
        images = self.generator.eval()(self.latent(n, generator))
        self.generator.train(training)
        return images
