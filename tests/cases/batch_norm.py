"""Calls of batch_norm for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels import functional as F

from . import Case, OpInfoEntry, Sample, normal


def _reference(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    output = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, **kwargs)
    if residual is not None:
        output = output + residual
    applied = {None: lambda x: x, "relu": torch.relu, "relu6": torch.nn.functional.relu6}
    return applied[activation](output)


def _function(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    return F.batch_norm(input, running_mean, running_var, weight, bias, residual=residual, **kwargs)


def _build(
    *shape: int, affine: bool = True, activation: str | None = None, training: bool = True, shift: float = 0.0
) -> Callable[[torch.dtype], Sample]:
    def build(dtype: torch.dtype) -> Sample:
        channels = shape[1]
        input = normal(*shape, seed=1, dtype=torch.float64) * 2 + shift
        args = [input.to(dtype)]
        kwargs: dict[str, Any] = {"training": training}
        if affine:
            args += [normal(channels, seed=seed, dtype=torch.float64).to(dtype) for seed in (2, 3)]
        if activation is not None:
            args.append(normal(*shape, seed=4, dtype=dtype) * (1 if activation == "relu" else 5))
            kwargs["activation"] = activation
        if not training:
            kwargs["running_mean"] = normal(channels, seed=5, dtype=dtype)
            kwargs["running_var"] = normal(channels, seed=6, dtype=torch.float64).abs().add(0.5).to(dtype)
        return Sample(tuple(args), kwargs)

    return build


def _case(name: str, build: Callable[[torch.dtype], Sample], **kwargs: Any) -> Case:
    # Of an infinite weight torch makes NaN, because it computes x * a + (b - mean * a); (x - mean) * a + b is infinite.
    return Case("batch_norm", name, _function, _reference, build, integers=False, infinite_arguments=(0, 3), **kwargs)


CASES = [
    _case("images", _build(4, 5, 3, 6), primary=True),
    _case("large_images", _build(3, 17, 41, 53)),
    _case("features", _build(9, 21)),
    _case("sequences_plain", _build(4, 6, 19, affine=False)),
    _case("volumes", _build(2, 3, 4, 5, 3)),
    _case("evaluation", _build(3, 18, 7, 5, training=False)),
    _case("relu_residual", _build(4, 18, 5, 6, activation="relu"), primary=True),
    _case("relu_residual_evaluation", _build(3, 5, 4, 4, activation="relu", training=False)),
    _case("relu6_residual", _build(4, 18, 5, 6, activation="relu6")),
    _case("relu6_residual_evaluation", _build(3, 5, 4, 4, activation="relu6", training=False)),
    _case("far_from_zero", _build(4, 3, 9, 7, shift=30.0)),
]


def _operator_arguments(activation: str | None = None) -> tuple[Any, ...]:
    input, weight, bias, residual = _build(3, 4, 2, 5, activation="relu")(torch.float32).args
    grads = [t.requires_grad_() for t in (input, weight, bias, residual)]
    return (*grads, None, None, True, 1e-5, activation)


def _backward_arguments() -> tuple[Any, ...]:
    input, weight, bias, residual, *rest = _operator_arguments("relu")
    with torch.no_grad():
        output, mean, variance = torch.ops.dlkernels.batch_norm(input, weight, bias, residual, *rest)
    grad_output = normal(*input.shape, seed=9, dtype=torch.float32).requires_grad_()
    types = (torch.float32, torch.float32)
    return (grad_output, input, output, weight, None, mean, variance, True, 1e-5, "relu", *types, [True] * 4)


def _update_arguments() -> tuple[Any, ...]:
    return (*(normal(4, seed=seed, dtype=torch.float32) for seed in range(4)), 30, 0.1)


OPERATOR_SAMPLES = [
    ("batch_norm", _operator_arguments),
    ("batch_norm_backward", _backward_arguments),
    ("update_running_statistics_", _update_arguments),
]

OPINFO = [OpInfoEntry("batch_norm", "nn.functional.batch_norm", F.batch_norm)]
