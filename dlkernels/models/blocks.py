"""Pieces that several convolutional families are made of."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

Layer = Callable[[], torch.nn.Module]
NormLayer = Callable[[int], torch.nn.Module]  # of the number of channels


def conv_norm_activation(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    *,
    activation: Layer | None,
    norm_layer: NormLayer,
    layers: ModuleType,
) -> torch.nn.Sequential:
    """Convolution padded to divide height and width by ``stride`` alone, norm, and activation unless it is None."""
    padding = (kernel_size - 1) // 2
    modules = [
        layers.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        norm_layer(out_channels),
    ]
    if activation is not None:
        modules.append(activation())
    return layers.Sequential(*modules)


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, but never less than nine tenths of it."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * channels else nearest + divisor
