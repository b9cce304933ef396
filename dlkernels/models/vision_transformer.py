"""The Vision Transformer (Dosovitskiy et al. 2021): an image is a sequence of patches, and attention mixes them.

Names, initial values and results are those of torchvision's, whose ``state_dict`` loads strictly.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import nn
from .registry import register

NormLayer = Callable[[int], torch.nn.Module]
layer_norm = partial(torch.nn.LayerNorm, eps=1e-6)


class MLPBlock(torch.nn.Sequential):
    """Linear, GELU, linear on each token alone, with dropout after both: ``[N, L, E]`` to the same."""

    def __init__(self, hidden_dim: int, mlp_dim: int, dropout: float, layers: ModuleType) -> None:
        super().__init__(
            layers.Linear(hidden_dim, mlp_dim),
            torch.nn.GELU(),
            torch.nn.Dropout(dropout),
            layers.Linear(mlp_dim, hidden_dim),
            torch.nn.Dropout(dropout),
        )
        for linear in self:
            if isinstance(linear, torch.nn.Linear):
                torch.nn.init.xavier_uniform_(linear.weight)
                torch.nn.init.normal_(linear.bias, std=1e-6)


class EncoderBlock(torch.nn.Module):
    """Attention between tokens, then an MLP on each, both normalised before and added to their input (section 3.1)."""

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
        norm_layer: NormLayer,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.ln_1 = norm_layer(hidden_dim)
        self.self_attention = layers.MultiheadAttention(
            hidden_dim, num_heads, dropout=attention_dropout, batch_first=True
        )
        self.dropout = torch.nn.Dropout(dropout)
        self.ln_2 = norm_layer(hidden_dim)
        self.mlp = MLPBlock(hidden_dim, mlp_dim, dropout, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)  # [N, L, E]
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Encoder(torch.nn.Module):
    """Adds a learned position to each token; ``num_layers`` blocks and a last norm: ``[N, L, E]`` to the same."""

    def __init__(
        self,
        seq_length: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float,
        attention_dropout: float,
        norm_layer: NormLayer,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.pos_embedding = torch.nn.Parameter(torch.empty(1, seq_length, hidden_dim).normal_(std=0.02))
        self.dropout = torch.nn.Dropout(dropout)
        block = partial(
            EncoderBlock, num_heads, hidden_dim, mlp_dim, dropout, attention_dropout, norm_layer, layers=layers
        )
        self.layers = torch.nn.Sequential(
            OrderedDict((f"encoder_layer_{index}", block()) for index in range(num_layers))
        )
        self.ln = norm_layer(hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


@register
class VisionTransformer(torch.nn.Module):
    """Images ``[N, 3, S, S]`` to logits ``[N, num_classes]``.

    Args:
        image_size: height and width S of the images.
        patch_size: height and width P of a patch; S is a multiple of it.
        num_layers: blocks.
        num_heads: attention heads of a block; ``hidden_dim`` is a multiple of it.
        hidden_dim: size E of a token.
        mlp_dim: hidden size of the MLP of a block.
        dropout: after the positions, attention and linear layers.
        attention_dropout: of attention weights.
        num_classes: classes to tell apart.
        representation_size: size of a hidden layer before the logits, as in pre-training; none if not given.
        norm_layer: makes the norms.
        layers: where the other layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``image_size`` is no multiple of ``patch_size``, or ``hidden_dim`` of ``num_heads``; an image of
            another size.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        mlp_dim: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        num_classes: int = 1000,
        representation_size: int | None = None,
        norm_layer: NormLayer = layer_norm,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            raise ValueError(f"image_size must be a multiple of patch_size, {patch_size}, got {image_size}")
        if hidden_dim % num_heads != 0:
            raise ValueError(f"hidden_dim must be a multiple of num_heads, {num_heads}, got {hidden_dim}")
        self.image_size = image_size
        self.conv_proj = layers.Conv2d(3, hidden_dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, hidden_dim))
        self.encoder = Encoder(
            (image_size // patch_size) ** 2 + 1,
            num_layers,
            num_heads,
            hidden_dim,
            mlp_dim,
            dropout,
            attention_dropout,
            norm_layer,
            layers,
        )
        heads: OrderedDict[str, torch.nn.Module] = OrderedDict()
        if representation_size is not None:
            heads["pre_logits"] = layers.Linear(hidden_dim, representation_size)
            heads["act"] = torch.nn.Tanh()
        heads["head"] = layers.Linear(representation_size or hidden_dim, num_classes)
        self.heads = torch.nn.Sequential(heads)
        for layer in (self.conv_proj, *self.heads):  # LeCun's scale
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.trunc_normal_(layer.weight, std=math.sqrt(1 / layer.weight[0].numel()))
                torch.nn.init.zeros_(layer.get_parameter("bias"))
        torch.nn.init.zeros_(heads["head"].get_parameter("weight"))  # all classes equally likely at first

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"x must be images of {self.image_size} x {self.image_size}, got {list(x.shape)}")
        x = self.conv_proj(x).flatten(2).transpose(1, 2)  # [N, (S/P)^2, E]
        class_token = self.class_token.expand(x.shape[0], -1, -1)
        x = self.encoder(torch.cat([class_token, x], dim=1))  # [N, (S/P)^2 + 1, E]
        return self.heads(x[:, 0])  # [N, num_classes]


# Layers, heads, size of a token, hidden size of the MLP (table 1 of the paper).
BASE = (12, 12, 768, 3072)
LARGE = (24, 16, 1024, 4096)
HUGE = (32, 16, 1280, 5120)


@register
def vit_b_16(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> VisionTransformer:
    """ViT-Base on patches of 16 x 16; the other arguments are those of :class:`VisionTransformer`."""
    return VisionTransformer(image_size, 16, *BASE, layers=layers, **arguments)


@register
def vit_b_32(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> VisionTransformer:
    """ViT-Base on patches of 32 x 32."""
    return VisionTransformer(image_size, 32, *BASE, layers=layers, **arguments)


@register
def vit_l_16(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> VisionTransformer:
    """ViT-Large on patches of 16 x 16."""
    return VisionTransformer(image_size, 16, *LARGE, layers=layers, **arguments)


@register
def vit_l_32(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> VisionTransformer:
    """ViT-Large on patches of 32 x 32."""
    return VisionTransformer(image_size, 32, *LARGE, layers=layers, **arguments)


@register
def vit_h_14(image_size: int = 224, *, layers: ModuleType = nn, **arguments: Any) -> VisionTransformer:
    """ViT-Huge on patches of 14 x 14."""
    return VisionTransformer(image_size, 14, *HUGE, layers=layers, **arguments)
