"""The two-dimensional convolution as a module."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` computed by :func:`dlkernels.functional.conv2d`; every ``padding_mode`` is supported.

    Examples:
        >>> layer = Conv2d(3, 8, 3, padding=1)
        >>> layer(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 8, 32, 32])
        >>> isinstance(layer, torch.nn.Conv2d)
        True
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: int | tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
