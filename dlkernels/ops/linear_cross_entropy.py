"""Cross-entropy of a linear layer without its logits (Wijmans et al. 2024, *Cut Your Losses in Large-Vocabulary
Language Models*; online softmax: Milakov and Gimelshein 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .arguments import check_tensors, named
from .cross_entropy import _reduction, loss_type
from .registration import register_fake, traced_as
from .special_calls import elsewhere


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)`` that never holds the logits.

    Same arguments and results as ``torch.nn.functional.linear_cross_entropy`` (torch 2.13). Forward and backward
    compute the logits of a few hundred classes and rows at a time, so that the memory beside the arguments and their
    gradients is a few copies of ``input``, whatever the number of classes.

    Args:
        input: shape ``[in]`` or ``[N, in]``; float32, float64, bfloat16 or float16.
        linear_weight: shape ``[C, in]``, or ``[C, d1, ..., dK, in]`` for a K-dimensional loss of ``[N, in]`` input.
        target: class indices (int64 or uint8) of shape ``[]``, ``[N]`` or ``[N, d1, ..., dK]``, or class probabilities
            of shape ``[C]``, ``[N, C]`` or ``[N, C, d1, ..., dK]``, of any type that ``input`` may have.
        linear_bias: shape ``linear_weight.shape[:-1]``.
        weight: weight of each class, shape ``[C]``, with the type of ``input``, or of any type beside class
            probabilities. Not differentiable.
        reduction: ``"none"``, ``"mean"`` (over the weights of the rows that count) or ``"sum"``.
        ignore_index: rows with this target contribute neither to the loss nor to the gradient; ``None`` is -100. Only
            with class indices.
        label_smoothing: in ``[0, 1]``, the share of the uniform distribution in every target (Szegedy et al. 2016).
        options: torch's choice of how to cut the logits into chunks. Accepted and without effect: here they are always
            cut, in the one way the kernels are made for.

    Returns:
        The loss, a scalar, or of the shape of the class indices with ``reduction="none"``. Its type is that of
        ``input``, promoted by class probabilities and the weights beside them.

    Raises:
        IndexError: a class index is outside ``[0, C)`` and not ``ignore_index``.
        ValueError: the batch sizes differ, or ``reduction`` is unknown.
        TypeError: an argument is of a kind that has no meaning here.
        RuntimeError: any other shape or type that does not fit.

    Examples:
        >>> hidden, weight = torch.zeros(4, 16), torch.randn(1000, 16)
        >>> linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 4]))  # log 1000
        tensor(6.9078)
    """
    if _C.is_special(input, linear_weight, target, linear_bias, weight):
        loss = elsewhere(
            *("linear_cross_entropy", linear_cross_entropy, _by_torch),
            (input, linear_weight, target, linear_bias, weight),
            *(input, linear_weight, target),
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        if loss is not NotImplemented:
            return loss
    if not (isinstance(input, Tensor) and isinstance(linear_weight, Tensor) and isinstance(target, Tensor)):
        check_tensors(  # type: ignore[unreachable]
            "linear_cross_entropy", input=input, linear_weight=linear_weight, target=target
        )
    ignored = _ignored_index(input, linear_weight, target, ignore_index)
    code = _reduction("linear_cross_entropy", reduction)
    if linear_weight.dim() > 2:
        if linear_bias is not None:
            check_tensors("linear_cross_entropy", linear_bias=linear_bias)
        if weight is not None:
            check_tensors("linear_cross_entropy", weight=weight)
        return _loss_of_many_outputs(
            input, linear_weight, linear_bias, target, weight, reduction, ignored, label_smoothing
        )
    arguments = (input, linear_weight, linear_bias, target, weight, code, ignored, label_smoothing)
    try:
        return _C.linear_cross_entropy(*arguments)
    except TypeError as error:
        names = "input linear_weight linear_bias target weight reduction ignore_index label_smoothing"
        raise named(error, _C.linear_cross_entropy, names, arguments) from None


def _ignored_index(input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int | None) -> int:
    probabilities = target.shape == (*input.shape[:-1], *linear_weight.shape[:-1])
    if probabilities and ignore_index is not None:
        raise RuntimeError("linear_cross_entropy: ignore_index cannot be specified when target contains probabilities")
    return -100 if ignore_index is None else ignore_index


def _by_torch(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: Any,
) -> Tensor:
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = torch.nn.functional.linear(input, linear_weight.flatten(0, -2), bias)
    return torch.nn.functional.cross_entropy(
        logits.unflatten(-1, linear_weight.shape[:-1]),
        target,
        weight,
        ignore_index=_ignored_index(input, linear_weight, target, ignore_index),
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 in place of ``dtype``; any other type stays, for the operator to judge."""
    return tensor.float() if tensor.dtype == dtype else tensor


def _check_many_outputs(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor) -> None:
    """Shapes of a K-dimensional loss.

    Raises:
        RuntimeError: one does not fit the weight's.
        ValueError: the target's batch size is another.
    """
    classes, *positions, features = linear_weight.shape
    if input.dim() != 2:
        raise RuntimeError(
            "linear_cross_entropy: K-dimensional loss defined by linear_weight shape "
            f"{tuple(linear_weight.shape)} requires batched input, (N, {features}), got unbatched input with shape "
            f"{tuple(input.shape)}"
            if input.dim() == 1
            else f"linear_cross_entropy: expected input with dimensionality 1 or 2, got {input.dim()}"
        )
    rows = input.shape[0]
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"linear_cross_entropy: expected linear_bias shape {(classes, *positions)}, got {tuple(linear_bias.shape)}"
        )
    if target.shape != (rows, classes, *positions):  # class indices
        if target.dim() == 0 or target.shape[0] != rows:
            got = 0 if target.dim() == 0 else target.shape[0]
            raise ValueError(
                f"linear_cross_entropy: Expected input batch_size ({rows}) to match target batch_size ({got})."
            )
        if target.shape != (rows, *positions):
            raise RuntimeError(
                f"linear_cross_entropy: Expected target size {[rows, *positions]}, got {list(target.shape)}"
            )


def _loss_of_many_outputs(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """A K-dimensional loss is one loss for each of the ``d1 * ... * dK`` positions of the weight."""
    dtype = loss_type(input.dtype, target, weight)
    if target.is_floating_point() and not input.dtype == target.dtype == dtype:
        return _loss_of_many_outputs(
            input.to(dtype),
            linear_weight.to(dtype) if linear_weight.dtype == input.dtype else linear_weight,
            linear_bias.to(dtype) if linear_bias is not None and linear_bias.dtype == input.dtype else linear_bias,
            target.to(dtype),
            None if weight is None else weight.to(dtype),
            reduction,
            ignore_index,
            label_smoothing,
        )
    if input.dtype in (torch.bfloat16, torch.float16):  # widened: every position adds to the gradient of the input
        loss = _loss_of_many_outputs(
            input.float(),
            _widened(linear_weight, input.dtype),
            None if linear_bias is None else _widened(linear_bias, input.dtype),
            _widened(target, input.dtype),
            None if weight is None else _widened(weight, input.dtype),
            reduction,
            ignore_index,
            label_smoothing,
        )
        device = input.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return loss if autocast else loss.to(input.dtype)
    _check_many_outputs(input, linear_weight, linear_bias, target)
    rows = input.shape[0]
    classes, *positions, features = linear_weight.shape
    probabilities = target.shape == (rows, classes, *positions)
    count = math.prod(positions)
    weights = linear_weight.reshape(classes, count, features)
    biases = None if linear_bias is None else linear_bias.reshape(classes, count)
    targets = target.reshape(*target.shape[: 2 if probabilities else 1], count)
    losses = [
        _C.linear_cross_entropy(
            input,
            weights[:, i],
            None if biases is None else biases[:, i],
            targets[..., i],
            weight,
            0,
            ignore_index,
            label_smoothing,
        )
        for i in range(count)
    ]
    loss = torch.stack(losses, 1) if losses else input[:, :0]
    if reduction == "none":
        loss = loss.reshape(rows, *positions)
    elif reduction == "sum":
        loss = loss.sum(dtype=torch.float64)
    elif probabilities:
        loss = loss.sum(dtype=torch.float64) / loss.numel()
    else:
        counts = targets.ne(ignore_index)
        shares = counts
        if weight is not None:
            shares = counts * weight[targets.long().masked_fill(~counts, 0)]
        loss = loss.sum(dtype=torch.float64) / shares.sum(dtype=torch.float64)
    return loss.to(losses[0].dtype if losses else input.dtype)


@traced_as(_C.linear_cross_entropy)
def _traced(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    wide_loss = False
    if target.is_floating_point():
        layer, dtype = input.dtype, loss_type(input.dtype, target, weight)
        target, weight = target.to(dtype), None if weight is None else weight.to(dtype)
        # The type that half types are summed in is a loss of theirs; for another the whole layer is computed in it.
        wide_loss = dtype != layer and dtype == torch.float32
        if not wide_loss:
            input = input.to(dtype)
            linear_weight = linear_weight.to(dtype) if linear_weight.dtype == layer else linear_weight
            linear_bias = (
                linear_bias.to(dtype) if linear_bias is not None and linear_bias.dtype == layer else linear_bias
            )
    outputs = torch.ops.dlkernels.linear_cross_entropy.default(
        input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, wide_loss
    )
    return outputs[0]


@register_fake("dlkernels::linear_cross_entropy")
def _fake(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    wide_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows = input.shape[0] if input.dim() == 2 else 1
    return (
        input.new_empty(
            list(input.shape[:-1]) if reduction == 0 else [], dtype=accumulate if wide_loss else input.dtype
        ),
        input.new_empty([3, rows], dtype=accumulate),
        input.new_empty([], dtype=torch.float64),
    )


@register_fake("dlkernels::linear_cross_entropy_backward")
def _fake_backward(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    divisor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    def like(wanted: bool, tensor: Tensor | None) -> Tensor | None:
        return tensor.new_empty(tensor.shape) if wanted and tensor is not None else None

    return (
        like(output_mask[0], input),
        like(output_mask[1], linear_weight),
        like(output_mask[2], linear_bias),
        like(output_mask[3], target),
    )


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The loss as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing)`` with
    ``reduction`` 0 (none), 1 (mean) or 2 (sum) returns ``(loss, statistics, divisor)``; only ``loss`` is
    differentiable.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        reduction: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dlkernels.linear_cross_entropy.default(
            input, linear_weight, linear_bias, target, weight, reduction, ignore_index, label_smoothing, False
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, _, ctx.ignore_index, ctx.label_smoothing = inputs
        _, statistics, divisor = output
        ctx.mark_non_differentiable(statistics, divisor)
        ctx.save_for_backward(*tensors, statistics, divisor)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = torch.ops.dlkernels.linear_cross_entropy_backward.default(
            grad_loss, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing, list(ctx.needs_input_grad[:4])
        )
        return (*grads, None, None, None, None)
