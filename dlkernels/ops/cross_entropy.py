"""Softmax cross-entropy (Bishop, *Pattern Recognition and Machine Learning*, section 4.3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C
from .arguments import named
from .registration import register_fake, traced_as
from .special_calls import elsewhere

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def _reduction(operation: str, reduction: str, size_average: bool | None = None, reduce: bool | None = None) -> int:
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    try:
        return _REDUCTIONS[reduction]
    except (KeyError, TypeError):
        expected = "expected 'none', 'mean' or 'sum'"
        raise ValueError(f"{operation}: {reduction} is not a valid value for reduction, {expected}") from None


def loss_type(logits: torch.dtype, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The type of a loss: that of the logits, promoted as torch does by class probabilities and weights beside them."""
    if not target.is_floating_point():
        return logits
    promoted = torch.promote_types(logits, target.dtype)
    if weight is not None:
        promoted = torch.promote_types(promoted, weight.dtype)
    return promoted if promoted.is_floating_point else logits  # the operator refuses the others


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy between logits and targets; same arguments and results as ``torch.nn.functional.cross_entropy``.

    Args:
        input: logits of shape ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``; float32, float64, bfloat16 or float16.
        target: class indices (int64 or uint8) of shape ``[]``, ``[N]`` or ``[N, d1, ...]``, or class probabilities with
            the shape of ``input``, of any of its types.
        weight: weight of each class, shape ``[C]``, with the type of ``input``, or of any type beside class
            probabilities. Not differentiable.
        ignore_index: rows with this target contribute neither to the loss nor to the gradient.
        reduction: ``"none"``, ``"mean"`` (over the weights of the rows that count) or ``"sum"``.
        label_smoothing: in ``[0, 1]``, the share of the uniform distribution in every target (Szegedy et al. 2016).
        size_average, reduce: deprecated spellings of ``reduction``.

    Returns:
        The loss, a scalar, or of the shape of the class indices with ``reduction="none"``. Its type is that of
        ``input``, promoted by class probabilities and the weights beside them.

    Raises:
        IndexError: a class index is outside ``[0, C)`` and not ``ignore_index``.
        ValueError: the batch sizes differ, or ``reduction`` is unknown.
        RuntimeError: any other shape or type that does not fit.

    Examples:
        >>> cross_entropy(torch.zeros(3, 10), torch.tensor([4, 0, 9]))  # log 10
        tensor(2.3026)
    """
    if _C.is_special(input, target, weight):
        tensors = (input, target, weight)
        loss = elsewhere(
            *("cross_entropy", cross_entropy, torch.nn.functional.cross_entropy, tensors),
            *(*tensors, size_average, ignore_index, reduce, reduction, label_smoothing),
        )
        if loss is not NotImplemented:
            return loss
    code = _reduction("cross_entropy", reduction, size_average, reduce)
    arguments = (input, target, weight, code, ignore_index, label_smoothing)
    try:
        return _C.cross_entropy(*arguments)
    except TypeError as error:
        names = "input target weight reduction ignore_index label_smoothing"
        raise named(error, _C.cross_entropy, names, arguments) from None


@traced_as(_C.cross_entropy)
def _traced(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> Tensor:
    if target.is_floating_point():
        dtype = loss_type(logits.dtype, target, weight)
        logits, target = logits.to(dtype), target.to(dtype)
        weight = None if weight is None else weight.to(dtype)
    outputs = torch.ops.dlkernels.cross_entropy.default(
        logits, target, weight, reduction, ignore_index, label_smoothing
    )
    return outputs[0]


@register_fake("dlkernels::cross_entropy")
def _fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    class_dimension = 0 if logits.dim() == 1 else 1
    row_shape = [*logits.shape[:class_dimension], *logits.shape[class_dimension + 1 :]]
    rows = 1
    for size in row_shape:
        rows = rows * size
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(row_shape if reduction == 0 else []),
        logits.new_empty([2, rows], dtype=accumulate),
        logits.new_empty([], dtype=torch.float64),
    )


@register_fake("dlkernels::cross_entropy_backward")
def _fake_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    divisor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return (
        logits.new_empty(logits.shape) if output_mask[0] else None,
        logits.new_empty(logits.shape) if output_mask[1] else None,
    )


class CrossEntropyFunction(torch.autograd.Function):
    """Cross-entropy as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(logits, target, weight, reduction, ignore_index, label_smoothing)`` with ``reduction`` 0 (none), 1 (mean) or
    2 (sum) returns ``(loss, statistics, divisor)``; only ``loss`` is differentiable.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        logits: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, label_smoothing: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dlkernels.cross_entropy.default(
            logits, target, weight, reduction, ignore_index, label_smoothing
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, target, weight, _, ctx.ignore_index, ctx.label_smoothing = inputs
        _, statistics, divisor = output
        ctx.mark_non_differentiable(statistics, divisor)
        ctx.save_for_backward(logits, target, weight, statistics, divisor)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, target, weight, statistics, divisor = ctx.saved_tensors
        grads = torch.ops.dlkernels.cross_entropy_backward.default(
            grad_loss,
            logits,
            target,
            weight,
            statistics,
            divisor,
            ctx.ignore_index,
            ctx.label_smoothing,
            list(ctx.needs_input_grad[:2]),
        )
        return (*grads, None, None, None, None)
