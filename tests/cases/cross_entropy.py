"""Calls of cross_entropy for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dlkernels import functional as F
from dlkernels import nn

from . import Case, OpInfoEntry, Sample, normal


def _build(
    shape: tuple[int, ...], probabilities: bool = False, weighted: bool = False, ignored: bool = False, **kwargs: Any
) -> Callable[[torch.dtype], Sample]:
    class_dimension = 0 if len(shape) == 1 else 1
    classes = shape[class_dimension]

    def build(dtype: torch.dtype) -> Sample:
        arguments = dict(kwargs)
        logits = 3 * normal(*shape, seed=1, dtype=torch.float64)
        if weighted:
            arguments["weight"] = normal(classes, seed=3, dtype=torch.float64).abs().to(dtype)
        if probabilities:
            target = normal(*shape, seed=2, dtype=torch.float64).softmax(class_dimension)
            return Sample((logits.to(dtype), target.to(dtype)), arguments)
        generator = torch.Generator().manual_seed(2)
        target = torch.randint(classes, shape[:class_dimension] + shape[class_dimension + 1 :], generator=generator)
        if ignored:
            target.view(-1)[::3] = -100
        return Sample((logits.to(dtype), target), arguments)

    return build


def _case(name: str, build: Callable[[torch.dtype], Sample], primary: bool = False) -> Case:
    reference = torch.nn.functional.cross_entropy
    return Case("cross_entropy", name, F.cross_entropy, reference, build, primary=primary, integers=False)


CASES = [
    _case("indices", _build((6, 5)), primary=True),
    _case("many_classes", _build((9, 1003))),
    _case("many_rows", _build((700, 37), ignored=True, weighted=True)),
    _case("unbatched", _build((7,))),
    _case("ignored_weighted", _build((11, 10), ignored=True, weighted=True)),
    _case("smoothed_none", _build((5, 37), label_smoothing=0.1, reduction="none", ignored=True)),
    _case("images", _build((2, 19, 5, 7), ignored=True, weighted=True, label_smoothing=0.2)),
    _case("images_sum", _build((3, 4, 33), reduction="sum")),
    _case("probabilities", _build((6, 21), probabilities=True, weighted=True), primary=True),
    _case("probabilities_images", _build((2, 5, 3, 4), probabilities=True, label_smoothing=0.1, reduction="none")),
]


def _operator_arguments() -> tuple[Any, ...]:
    sample = _build((6, 5), weighted=True)(torch.float32)
    return (sample.args[0].requires_grad_(), sample.args[1], sample.kwargs["weight"], 1, -100, 0.1)


def _backward_arguments() -> tuple[Any, ...]:
    logits, target, weight, *_ = _operator_arguments()
    _, statistics, divisor = torch.ops.dlkernels.cross_entropy(logits.detach(), target, weight, 1, -100, 0.1)
    grad_loss = torch.ones((), requires_grad=True)
    return (grad_loss, logits, target, weight, statistics, divisor, -100, 0.1, [True, False])


OPERATOR_SAMPLES = [
    ("cross_entropy", _operator_arguments),
    ("cross_entropy_backward", _backward_arguments),
]

OPINFO = [OpInfoEntry("cross_entropy", "nn.functional.cross_entropy", F.cross_entropy)]

MODULEINFO = [("nn.CrossEntropyLoss", nn.CrossEntropyLoss)]
