"""Calls of linear for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlkernels import functional as F
from dlkernels import nn

from . import Case, OpInfoEntry, Sample, normal


def _build(input: tuple[int, ...], out: int | None, bias: bool = True) -> Callable[[torch.dtype], Sample]:
    def build(dtype: torch.dtype) -> Sample:
        features = input[-1]
        weight = normal(*((features,) if out is None else (out, features)), seed=2, dtype=dtype)
        args = (normal(*input, seed=1, dtype=dtype), weight)
        return Sample((*args, normal(*(() if out is None else (out,)), seed=3, dtype=dtype)) if bias else args)

    return build


def _case(name: str, build: Callable[[torch.dtype], Sample], primary: bool = False) -> Case:
    return Case("linear", name, F.linear, torch.nn.functional.linear, build, primary=primary)


CASES = [
    _case("rows", _build((6, 8), 5), primary=True),
    _case("no_bias", _build((5, 9), 7, bias=False)),
    _case("one_row", _build((1, 70), 45)),
    _case("few_rows", _build((5, 131), 37)),
    _case("many_rows", _build((300, 33), 20)),
    _case("wide", _build((17, 40), 531)),
    _case("deep", _build((13, 1100), 18)),
    _case("unbatched", _build((19,), 23)),
    _case("sequences", _build((3, 5, 20), 11)),
    _case("one_feature", _build((4, 1), 1)),
]


def _operator_arguments() -> tuple[Any, ...]:
    return tuple(a.requires_grad_() for a in _build((2, 3, 5), 4)(torch.float32).args)


def _backward_arguments() -> tuple[Any, ...]:
    input, weight, _ = _operator_arguments()
    return (torch.ones(2, 3, 4, requires_grad=True), input, weight, [True, True, False])


OPERATOR_SAMPLES = [("linear", _operator_arguments), ("linear_backward", _backward_arguments)]

OPINFO = [OpInfoEntry("linear", "nn.functional.linear", F.linear)]

MODULEINFO = [("nn.Linear", nn.Linear)]
