"""Blocks that several families share."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import nn


class ConvNormActivation(torch.nn.Module):
    """Convolution, batch norm and an activation, the last two in one kernel where they can be.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the filters.
        stride: distance between two outputs in the input.
        activation: what follows the norm.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        activation: torch.nn.Module,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        # No bias: batch norm subtracts the mean, and any bias with it.
        self.conv = layers.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm = layers.BatchNorm2d(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, out_channels, H/stride, W/stride]``."""
        return nn.norm_activation(self.norm, self.activation, self.conv(x))
