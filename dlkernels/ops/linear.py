"""Linear layer (Goodfellow, Bengio and Courville, *Deep Learning*, chapter 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .arguments import named
from .registration import register_fake, traced_as
from .special_calls import elsewhere


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``; same arguments and results as ``torch.nn.functional.linear``.

    Args:
        input: rows of features, ``[..., in_features]``; float32, float64, bfloat16 or float16.
        weight: ``[out_features, in_features]`` or ``[in_features]``, with the type of ``input``.
        bias: ``[out_features]``, or one number for all, with the type of ``input``.

    Returns:
        ``[..., out_features]``, without the last dimension for a ``weight`` of one dimension; contiguous.

    Raises:
        RuntimeError: shapes, types or devices do not fit together.
        NotImplementedError: the type is none of those above.

    Examples:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0.5, 0.0]))
        tensor([[11.5000, 17.0000]])
    """
    if _C.is_special(input, weight, bias):
        tensors = (input, weight, bias)
        output = elsewhere("linear", linear, torch.nn.functional.linear, tensors, *tensors)
        if output is not NotImplemented:
            return output
    arguments = (input, weight, bias)
    try:
        return _C.linear(*arguments)
    except TypeError as error:
        names = "input weight bias"
        raise named(error, _C.linear, names, arguments) from None


@traced_as(_C.linear)
def _traced(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    matrix = weight.unsqueeze(0) if weight.dim() == 1 else weight
    if bias is not None and matrix.dim() == 2 and (bias.dim() == 0 or (bias.dim() == 1 and bias.shape[0] == 1)):
        bias = bias.expand(matrix.shape[0])
    output = torch.ops.dlkernels.linear.default(input, matrix, bias)
    return output.squeeze(-1) if weight.dim() == 1 else output


@register_fake("dlkernels::linear")
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(input.dim() > 0 and weight.dim() == 2, lambda: "linear: expected input [..., in] and weight [out, in]")
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: f"linear: mat1 and mat2 shapes cannot be multiplied: {list(input.shape)} and {list(weight.shape)}",
    )
    return input.new_empty([*input.shape[:-1], weight.shape[0]])


@register_fake("dlkernels::linear_backward")
def _fake_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    shapes = (input.shape, weight.shape, weight.shape[:1])
    grad_input, grad_weight, grad_bias = (
        input.new_empty(shape) if wanted else None for shape, wanted in zip(shapes, output_mask, strict=True)
    )
    return grad_input, grad_weight, grad_bias


class LinearFunction(torch.autograd.Function):
    """The layer as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(input, weight, bias)`` with a ``weight`` of two dimensions and a ``bias`` of ``out_features`` or ``None``.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        return torch.ops.dlkernels.linear.default(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return torch.ops.dlkernels.linear_backward.default(
            grad_output, *ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        )
