"""Calls of conv2d for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlkernels import functional as F

from . import Case, OpInfoEntry, Sample, normal


def _build(
    input: tuple[int, ...], weight: tuple[int, ...], bias: bool = True, **kwargs: Any
) -> Callable[[torch.dtype], Sample]:
    def build(dtype: torch.dtype) -> Sample:
        images, kernel = normal(*input, seed=1, dtype=dtype), normal(*weight, seed=2, dtype=dtype)
        args = (images, kernel, normal(weight[0], seed=3, dtype=dtype)) if bias else (images, kernel)
        return Sample(args, kwargs)

    return build


def _case(name: str, build: Callable[[torch.dtype], Sample], **properties: Any) -> Case:
    reference = torch.nn.functional.conv2d
    return Case("conv2d", name, F.conv2d, reference, build, channels_last=True, **properties)


# Winograd's transforms divide by 3 and 5, and round: see the head of csrc/cpu/conv2d_winograd.cc for the bound.
_WINOGRAD = {"float32_error": 6e-7, "integers": False}


CASES = [
    _case("3x3", _build((2, 3, 7, 9), (5, 3, 3, 3), padding=1), primary=True),
    _case("3x3_wide", _build((2, 20, 7, 6), (18, 20, 3, 3), padding=1)),
    _case("many_channels", _build((2, 140, 6, 5), (70, 140, 3, 3), bias=False)),
    _case("strided", _build((2, 4, 11, 8), (6, 4, 3, 3), stride=2, padding=1)),
    _case("stem", _build((1, 3, 31, 29), (9, 3, 7, 7), stride=2, padding=3)),
    _case("pointwise", _build((3, 33, 5, 7), (35, 33, 1, 1))),
    _case("pointwise_strided", _build((2, 8, 7, 9), (5, 8, 1, 1), stride=(2, 3))),
    _case("stride_beyond_kernel", _build((2, 3, 13, 11), (4, 3, 2, 3), stride=(5, 4))),
    _case("dilated", _build((1, 5, 14, 13), (5, 5, 3, 3), dilation=(2, 4), padding=(2, 4))),
    _case("same_even_kernel", _build((2, 3, 6, 7), (4, 3, 4, 2), padding="same", dilation=(1, 3))),
    _case("grouped", _build((2, 9, 8, 7), (9, 3, 3, 3), groups=3, padding=1, stride=(1, 2))),
    _case("depthwise", _build((2, 19, 8, 9), (19, 1, 3, 3), groups=19, padding=1)),
    _case("depthwise_strided", _build((2, 6, 11, 9), (6, 1, 5, 4), groups=6, padding=2, stride=2, dilation=(1, 2))),
    _case("depthwise_multiplier", _build((2, 4, 7, 6), (8, 1, 3, 3), groups=4)),
    _case("one_channel_digits", _build((3, 1, 12, 12), (6, 1, 5, 5), padding=2)),
    _case("unbatched", _build((4, 9, 8), (3, 4, 3, 3), padding="valid")),
    _case("whole_image_kernel", _build((3, 5, 6, 6), (7, 5, 6, 6))),
    _case("winograd", _build((2, 33, 11, 13), (34, 33, 3, 3), padding=1), **_WINOGRAD),
    _case("winograd_grouped", _build((1, 64, 9, 22), (66, 32, 3, 3), groups=2), **_WINOGRAD),
    _case("winograd_few_tiles", _build((4, 130, 7, 7), (35, 130, 3, 3), padding=1, bias=False), **_WINOGRAD),
    _case("one_row", _build((2, 4, 1, 260), (3, 4, 1, 9), padding=(0, 4))),
]


def _operator_arguments() -> tuple[Any, ...]:
    args = _build((2, 4, 7, 6), (6, 2, 3, 3))(torch.float32).args
    return (*(a.requires_grad_() for a in args), [2, 1], [1, 0, 2, 1], [1, 2], 2)


def _backward_arguments() -> tuple[Any, ...]:
    input, weight, bias, *numbers = _operator_arguments()
    output = torch.ops.dlkernels.conv2d(input.detach(), weight.detach(), bias.detach(), *numbers)
    return (torch.ones_like(output, requires_grad=True), input, weight, *numbers, [True, True, False])


OPERATOR_SAMPLES = [("conv2d", _operator_arguments), ("conv2d_backward", _backward_arguments)]

OPINFO = [OpInfoEntry("conv2d", "nn.functional.conv2d", F.conv2d)]
