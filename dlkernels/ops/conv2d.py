"""Two-dimensional convolution (Goodfellow, Bengio and Courville, *Deep Learning*, chapter 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .arguments import named
from .registration import register_fake, traced_as
from .special_calls import elsewhere


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of images; same arguments and results as ``torch.nn.functional.conv2d``.

    Args:
        input: images of shape ``[N, C, H, W]`` or ``[C, H, W]``; float32, float64, bfloat16 or float16.
        weight: kernels of shape ``[K, C / groups, kernel_H, kernel_W]``, with the type of ``input``.
        bias: shape ``[K]``, with the type of ``input``.
        stride: distance between neighbouring outputs, one number or one for each dimension.
        padding: zeros added on both sides, one number or one for each dimension; ``"valid"`` is none, ``"same"`` as
            many as keep the size (stride 1 only).
        dilation: distance between neighbouring kernel elements.
        groups: parts of the channels that are convolved apart; divides ``C`` and ``K``.

    Returns:
        ``[N, K, output_H, output_W]`` (or without ``N``), in ``torch.channels_last`` where the input or the weight is.
        Without input channels that is the bias: the sum is empty. torch gives ``[N, 0, output_H, output_W]``.

    Raises:
        RuntimeError: shapes, types or devices do not fit together, a number is out of range, or a size that follows
            from them does not fit into 64 bits.
        TypeError: an argument is of a kind that has no meaning here.

    Examples:
        >>> images, kernels = torch.randn(2, 3, 32, 32), torch.randn(8, 3, 3, 3)
        >>> conv2d(images, kernels, stride=2, padding=1).shape
        torch.Size([2, 8, 16, 16])
    """
    if _C.is_special(input, weight, bias):
        tensors = (input, weight, bias)
        output = elsewhere(
            *("conv2d", conv2d, torch.nn.functional.conv2d, tensors), *tensors, stride, padding, dilation, groups
        )
        if output is not NotImplemented:
            return output
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    try:
        return _C.conv2d(*arguments)
    except TypeError as error:
        names = "input weight bias stride padding dilation groups"
        raise named(error, _C.conv2d, names, arguments) from None


def _pair(value: int | tuple[int, ...]) -> list[int]:
    return [*value] * (2 // len(value)) if isinstance(value, (tuple, list)) else [value, value]


def _sides(padding: int | tuple[int, ...] | str, weight: Tensor, dilation: list[int]) -> list[int]:
    """Zeros at the top, bottom, left and right."""
    if padding == "same":
        totals = [(size - 1) * step for size, step in zip(weight.shape[2:], dilation, strict=True)]
        return [side for total in totals for side in (total // 2, total - total // 2)]
    vertical, horizontal = _pair(0 if padding == "valid" else padding)  # type: ignore[arg-type]
    return [vertical, vertical, horizontal, horizontal]


@traced_as(_C.conv2d)
def _traced(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, ...],
    padding: int | tuple[int, ...] | str,
    dilation: int | tuple[int, ...],
    groups: int,
) -> Tensor:
    steps, spread = _pair(stride), _pair(dilation)
    if padding == "same" and steps != [1, 1]:
        raise RuntimeError("conv2d: padding='same' is not supported for strided convolutions")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise RuntimeError(f"conv2d: Invalid padding string: '{padding}', expected 'valid' or 'same'")
    images = input.unsqueeze(0) if input.dim() == 3 else input
    output = torch.ops.dlkernels.conv2d.default(
        images, weight, bias, steps, _sides(padding, weight, spread), spread, groups
    )
    return output.squeeze(0) if input.dim() == 3 else output


def _fitting(size: int) -> int:
    """``size``, where the kernels' 64 bits hold it.

    Raises:
        RuntimeError: they do not.
    """
    if isinstance(size, int) and size >= 1 << 63:  # a symbolic size is held to them where it gets its value
        raise RuntimeError(f"conv2d: a padded size or the extent of the kernel is too large: {size} is not below 2^63")
    return size


def _memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    formats = [torch._prims_common.suggest_memory_format(t) for t in (input, weight)]
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


@register_fake("dlkernels::conv2d")
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    torch._check(input.dim() == 4 and weight.dim() == 4, lambda: "conv2d: expected 4-dimensional input and weight")
    torch._check(
        input.shape[1] == weight.shape[1] * groups,
        lambda: (
            f"conv2d: Given groups={groups}, weight of size {list(weight.shape)}, expected input"
            f"{list(input.shape)} to have {weight.shape[1] * groups} channels, but got {input.shape[1]} channels "
            "instead"
        ),
    )
    padded = [_fitting(input.shape[2 + i] + padding[2 * i] + padding[2 * i + 1]) for i in range(2)]
    extents = [_fitting(dilation[i] * (weight.shape[2 + i] - 1) + 1) for i in range(2)]
    torch._check(
        padded[0] >= extents[0] and padded[1] >= extents[1],
        lambda: (
            f"conv2d: Calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
            f"({extents[0]} x {extents[1]}). Kernel size can't be greater than actual input size"
        ),
    )
    sizes = [(padded[i] - extents[i]) // stride[i] + 1 for i in range(2)]
    shape = [input.shape[0], weight.shape[0], *sizes]
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=_memory_format(input, weight))


@register_fake("dlkernels::conv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    def empty(like: Tensor, memory_format: torch.memory_format) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=memory_format)

    return (
        empty(input, _memory_format(input, weight)) if output_mask[0] else None,
        empty(weight, _memory_format(weight, weight)) if output_mask[1] else None,
        weight.new_empty([weight.shape[0]]) if output_mask[2] else None,
    )


class Conv2dFunction(torch.autograd.Function):
    """Convolution as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(input, weight, bias, stride, padding, dilation, groups)`` with ``[N, C, H, W]`` images, ``stride`` and
    ``dilation`` of two numbers and ``padding`` of four: top, bottom, left, right.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        return torch.ops.dlkernels.conv2d.default(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.numbers = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight = ctx.saved_tensors
        grads = torch.ops.dlkernels.conv2d_backward.default(
            grad_output, input, weight, *ctx.numbers, list(ctx.needs_input_grad[:3])
        )
        return (*grads, None, None, None, None)
