"""Batch normalisation (Ioffe and Szegedy 2015), with an optional residual and ReLU in the same kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .arguments import named, truth
from .registration import register_fake, traced_as
from .special_calls import elsewhere


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalises each channel; same arguments and results as ``torch.nn.functional.batch_norm``, and two more.

    Args:
        input: shape ``[N, C]`` to ``[N, C, D, H, W]``, contiguous or channels last; float32, float64, bfloat16 or
            float16.
        running_mean, running_var: shape ``[C]``; used when not training, moved towards the batch's mean and unbiased
            variance when training. May be None when training.
        weight, bias: shape ``[C]``, None for ones and zeros. All four may be float32 when ``input`` is a half type.
        training: whether to use the statistics of this batch.
        momentum: how far the running statistics move.
        eps: added to the variance, inside the root.
        activation: applied to the result, in the same pass: ``"relu"`` is max(0, .), ``"relu6"`` also at most 6.
        residual: a tensor like ``input``, added before the activation, in the same pass.

    Raises:
        ValueError: fewer than two values a channel when training, ``eps`` negative; when training, ``eps`` zero or one
            of the running statistics without the other; an unknown ``activation``.
        RuntimeError: a shape or type that does not fit.

    Examples:
        >>> images = torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]])  # one channel, mean 4, variance 5
        >>> batch_norm(images, None, None, training=True).flatten()
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
        >>> batch_norm(images, None, None, training=True, activation="relu").flatten()
        tensor([0.0000, 0.0000, 0.4472, 1.3416])
    """
    if training is not True and training is not False:
        training = truth("batch_norm", "training", training)  # type: ignore[unreachable]
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var must either both be None or neither be None")
    if _C.is_special(input, running_mean, running_var, weight, bias, residual):
        output = elsewhere(
            *("batch_norm", batch_norm, _by_torch, (input, running_mean, running_var, weight, bias, residual)),
            *(input, running_mean, running_var, weight, bias, training, momentum, eps),
            activation=activation,
            residual=residual,
        )
        if output is not NotImplemented:
            return output
    statistics = (running_mean, running_var, training, momentum, eps, activation)
    arguments = (input, weight, bias, residual, *statistics)
    try:
        if not training and eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
        return _C.batch_norm(*arguments)
    except TypeError as error:
        names = "input weight bias residual running_mean running_var training momentum eps activation"
        raise named(error, _C.batch_norm, names, arguments) from None


_APPLIED: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda output: output,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
}


def _by_torch(*arguments: Any, activation: str | None, residual: Tensor | None) -> Tensor:
    if activation not in _APPLIED:
        raise ValueError(f"batch_norm: activation must be None, 'relu' or 'relu6', got {activation!r}")
    output = torch.nn.functional.batch_norm(*arguments)
    return _APPLIED[activation](output if residual is None else output + residual)


@traced_as(_C.batch_norm)
def _traced(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
) -> Tensor:
    output, mean, variance = torch.ops.dlkernels.batch_norm.default(
        input, weight, bias, residual, running_mean, running_var, training, eps, activation
    )
    if training and input.dim() >= 2 and running_mean is not None and running_var is not None:
        count = input.shape[0]
        for size in input.shape[2:]:
            count = count * size
        torch.ops.dlkernels.update_running_statistics_.default(
            running_mean, running_var, mean, variance, count, momentum
        )
    return output


def _empty_like_kernel(input: Tensor) -> Tensor:
    """An output with the strides that the kernel gives it: dense, in the memory format of the input."""
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=_dense_format(input))


def _dense_format(input: Tensor) -> torch.memory_format:
    """As the kernel chooses it: a format that the input is dense in, before the one that its strides suggest."""
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(input.dim(), [])
    for memory_format in (torch.contiguous_format, *formats):
        if input.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch._prims_common.suggest_memory_format(input)


@register_fake("dlkernels::batch_norm")
def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [input.new_empty(input.shape[1:2], dtype=torch.float64) for _ in range(2)]
    return _empty_like_kernel(input), statistics[0], statistics[1]


@register_fake("dlkernels::batch_norm_backward")
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    weight_type: torch.dtype | None,
    bias_type: torch.dtype | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    return (
        _empty_like_kernel(input) if output_mask[0] else None,
        mean.new_empty(mean.shape, dtype=weight_type) if output_mask[1] else None,
        mean.new_empty(mean.shape, dtype=bias_type) if output_mask[2] else None,
        _empty_like_kernel(input) if output_mask[3] else None,
    )


@register_fake("dlkernels::update_running_statistics_")
def _fake_update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, count: int, momentum: float
) -> None:
    return None


class BatchNormFunction(torch.autograd.Function):
    """Batch norm as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(input, weight, bias, residual, running_mean, running_var, training, eps, activation)`` returns
    ``(output, mean, variance)``; only ``output`` is differentiable, and running statistics are not moved.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        eps: float,
        activation: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dlkernels.batch_norm.default(
            input, weight, bias, residual, running_mean, running_var, training, eps, activation
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        input, weight, bias, residual, _, _, ctx.training, ctx.eps, ctx.activation = inputs
        result, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.types = [None if parameter is None else parameter.dtype for parameter in (weight, bias)]
        # What torch's layers save: ReLU its output, ReLU6 its argument, which backward finds again or has a mask of.
        is_relu6 = ctx.activation == "relu6"
        stopped = (result <= 0) | (result >= 6) if is_relu6 and residual is not None else None
        kept_bias = bias.clone() if is_relu6 and bias is not None else None
        kept_output = result if ctx.activation == "relu" else None
        ctx.save_for_backward(input, kept_output, weight, kept_bias, mean, variance, stopped)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, stopped = ctx.saved_tensors
        grads = torch.ops.dlkernels.batch_norm_backward.default(
            grad_output if stopped is None else grad_output.masked_fill(stopped, 0),
            *tensors,
            ctx.training,
            ctx.eps,
            ctx.activation if stopped is None else None,
            *ctx.types,
            list(ctx.needs_input_grad[:4]),
        )
        return (*grads, None, None, None, None, None)
