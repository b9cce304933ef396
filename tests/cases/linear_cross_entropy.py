"""Calls of linear_cross_entropy for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels import functional as F
from dlkernels import nn

from . import Case, OpInfoEntry, Sample, normal


def _ours(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, **kwargs: Any) -> Tensor:
    return F.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **kwargs)


def _reference(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, **kwargs: Any
) -> Tensor:
    classes, *positions, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = torch.nn.functional.linear(input, linear_weight.reshape(-1, features), bias)
    return torch.nn.functional.cross_entropy(logits.reshape(*input.shape[:-1], classes, *positions), target, **kwargs)


def _build(
    rows: int | None,
    features: int,
    classes: int,
    *positions: int,
    bias: bool = True,
    probabilities: bool = False,
    weighted: bool = False,
    ignored: bool = False,
    **kwargs: Any,
) -> Callable[[torch.dtype], Sample]:
    batch = () if rows is None else (rows,)

    def build(dtype: torch.dtype) -> Sample:
        arguments = dict(kwargs)
        input = normal(*batch, features, seed=1, dtype=dtype)
        linear_weight = normal(classes, *positions, features, seed=2, dtype=dtype)
        linear_bias = normal(classes, *positions, seed=3, dtype=dtype) if bias else None
        if weighted:
            arguments["weight"] = normal(classes, seed=4, dtype=torch.float64).abs().to(dtype)
        if probabilities:
            target = normal(*batch, classes, *positions, seed=5, dtype=torch.float64).softmax(len(batch)).to(dtype)
        else:
            target = torch.randint(classes, (*batch, *positions), generator=torch.Generator().manual_seed(5))
            if ignored:
                target.view(-1)[::3] = -100
        return Sample((input, linear_weight, linear_bias, target), arguments)

    return build


def _case(name: str, build: Callable[[torch.dtype], Sample], primary: bool = False) -> Case:
    return Case("linear_cross_entropy", name, _ours, _reference, build, primary=primary, integers=False)


CASES = [
    _case("indices", _build(6, 8, 5), primary=True),
    _case("unbatched", _build(None, 7, 9)),
    _case("no_bias_sum", _build(17, 33, 40, bias=False, reduction="sum")),
    _case("ignored_weighted", _build(11, 13, 10, ignored=True, weighted=True)),
    _case("smoothed_none", _build(5, 12, 37, label_smoothing=0.1, reduction="none", ignored=True)),
    _case("many_classes", _build(9, 20, 1003, label_smoothing=0.1, weighted=True)),
    _case("many_rows", _build(301, 10, 211, ignored=True)),
    _case("deep", _build(70, 300, 31)),
    _case("probabilities", _build(6, 8, 21, probabilities=True, weighted=True), primary=True),
    _case("probabilities_smoothed_none", _build(19, 5, 203, probabilities=True, label_smoothing=0.1, reduction="none")),
    _case("dimensions", _build(4, 6, 5, 3, 2, ignored=True, weighted=True)),
    _case("dimensions_probabilities", _build(3, 6, 5, 4, probabilities=True, reduction="sum")),
]


def _operator_arguments() -> tuple[Any, ...]:
    sample = _build(6, 8, 5, weighted=True)(torch.float32).requiring_grad()
    return (*sample.args, sample.kwargs["weight"], 1, -100, 0.1, False)


def _backward_arguments() -> tuple[Any, ...]:
    *tensors, reduction, ignore_index, label_smoothing, wide_loss = _operator_arguments()
    detached = [t.detach() for t in tensors]
    _, statistics, divisor = torch.ops.dlkernels.linear_cross_entropy(
        *detached, reduction, ignore_index, label_smoothing, wide_loss
    )
    grad_loss = torch.ones((), requires_grad=True)
    return (grad_loss, *tensors, statistics, divisor, ignore_index, label_smoothing, [True, True, True, False])


OPERATOR_SAMPLES = [
    ("linear_cross_entropy", _operator_arguments),
    ("linear_cross_entropy_backward", _backward_arguments),
]

OPINFO = (
    [
        OpInfoEntry("linear_cross_entropy", f"nn.functional.linear_cross_entropy{variant}", F.linear_cross_entropy)
        for variant in ("", ".chunked", ".chunked_none")
    ]
    if hasattr(torch.nn.functional, "linear_cross_entropy")
    else []
)

MODULEINFO = [("nn.LinearCrossEntropyLoss", nn.LinearCrossEntropyLoss)]
