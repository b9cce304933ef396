"""MLP-Mixer (Tolstikhin et al. 2021): MLPs across the patches take the place of attention.

A block has two MLPs with skip connections: one mixes the patches, channel by channel, the other the channels, patch by
patch. Names are those of timm's, whose ``state_dict`` loads strictly; initial values are those of the paper's own code.
"""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .registry import register

layer_norm = partial(torch.nn.LayerNorm, eps=1e-6)


def lecun_normal_(weight: Tensor) -> None:
    """Normal values within two standard deviations, with variance 1 / fan-in after the cut (LeCun et al. 1998)."""
    of_the_cut = 0.8796256610342398  # standard deviation of a unit normal between -2 and 2
    deviation = math.sqrt(1 / weight[0].numel()) / of_the_cut
    torch.nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


class MLPBlock(torch.nn.Module):
    """Linear, GELU, linear over the last dimension: ``[..., features]`` to the same."""

    def __init__(self, features: int, hidden_features: int, layers: ModuleType) -> None:
        super().__init__()
        self.fc1 = layers.Linear(features, hidden_features)
        self.act = torch.nn.GELU()
        self.fc2 = layers.Linear(hidden_features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class MixerBlock(torch.nn.Module):
    """Mixes the tokens, then the channels, each normalised before and added to its input (section 2)."""

    def __init__(
        self, num_tokens: int, hidden_dim: int, tokens_mlp_dim: int, channels_mlp_dim: int, layers: ModuleType
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(hidden_dim)
        self.mlp_tokens = MLPBlock(num_tokens, tokens_mlp_dim, layers)
        self.norm2 = layer_norm(hidden_dim)
        self.mlp_channels = MLPBlock(hidden_dim, channels_mlp_dim, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).transpose(1, 2)  # [N, E, L]
        x = x + self.mlp_tokens(y).transpose(1, 2)  # [N, L, E]
        return x + self.mlp_channels(self.norm2(x))


class Patches(torch.nn.Module):
    """A linear function of each P x P patch: images ``[N, 3, S, S]`` to tokens ``[N, (S/P)^2, E]``."""

    def __init__(self, patch_size: int, hidden_dim: int, layers: ModuleType) -> None:
        super().__init__()
        self.proj = layers.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


@register
class MLPMixer(torch.nn.Module):
    """Images ``[N, 3, S, S]`` to logits ``[N, num_classes]``.

    Args:
        image_size: height and width S of the images.
        patch_size: height and width P of a patch; S is a multiple of it.
        num_layers: blocks.
        hidden_dim: size E of a token, its channels.
        tokens_mlp_dim: hidden size of the MLP that mixes the tokens.
        channels_mlp_dim: hidden size of the MLP that mixes the channels.
        num_classes: classes to tell apart.
        layers: where the layers with parameters come from, but for layer norm: ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``image_size`` is no multiple of ``patch_size``; an image of another size.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        hidden_dim: int,
        tokens_mlp_dim: int,
        channels_mlp_dim: int,
        num_classes: int = 1000,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            raise ValueError(f"image_size must be a multiple of patch_size, {patch_size}, got {image_size}")
        self.image_size = image_size
        num_tokens = (image_size // patch_size) ** 2
        self.stem = Patches(patch_size, hidden_dim, layers)
        self.blocks = torch.nn.Sequential(
            *(MixerBlock(num_tokens, hidden_dim, tokens_mlp_dim, channels_mlp_dim, layers) for _ in range(num_layers))
        )
        self.norm = layer_norm(hidden_dim)
        self.head = layers.Linear(hidden_dim, num_classes)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                lecun_normal_(module.weight)
                torch.nn.init.zeros_(module.get_parameter("bias"))
        torch.nn.init.zeros_(self.head.weight)  # all classes equally likely at first

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"x must be images of {self.image_size} x {self.image_size}, got {list(x.shape)}")
        x = self.blocks(self.stem(x))  # [N, (S/P)^2, E]
        return self.head(self.norm(x).mean(1))  # [N, num_classes]


# Layers, size of a token, hidden sizes of the MLPs across tokens and across channels (table 1 of the paper).
SMALL = (8, 512, 256, 2048)
BASE = (12, 768, 384, 3072)
LARGE = (24, 1024, 512, 4096)


@register
def mixer_s_16(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> MLPMixer:
    """Mixer-Small on patches of 16 x 16; the other arguments are those of :class:`MLPMixer`."""
    return MLPMixer(image_size, 16, *SMALL, layers=layers, **arguments)


@register
def mixer_b_16(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> MLPMixer:
    """Mixer-Base on patches of 16 x 16."""
    return MLPMixer(image_size, 16, *BASE, layers=layers, **arguments)


@register
def mixer_l_16(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> MLPMixer:
    """Mixer-Large on patches of 16 x 16."""
    return MLPMixer(image_size, 16, *LARGE, layers=layers, **arguments)
