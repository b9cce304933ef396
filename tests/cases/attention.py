"""Calls of scaled_dot_product_attention for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlkernels import functional as F

from . import Case, OpInfoEntry, Sample, normal


def _build(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    float_mask: tuple[int, ...] | None = None,
    bool_mask: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> Callable[[torch.dtype], Sample]:
    def build(dtype: torch.dtype) -> Sample:
        tensors = [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate((query, key, value), 1)]
        if float_mask is not None:
            tensors.append(normal(*float_mask, seed=4, dtype=dtype))
        if bool_mask is not None:
            visible = normal(*bool_mask, seed=5, dtype=torch.float64) > -0.7
            visible[..., 0] = True  # every query sees a key; queries that see none have tests of their own
            tensors.append(visible)
        return Sample(tuple(tensors), dict(kwargs))

    return build


def _heads_inside_rows(build: Callable[[torch.dtype], Sample]) -> Callable[[torch.dtype], Sample]:
    """As networks pass them: [B, L, H, E] in memory, heads transposed out."""

    def rearranged(dtype: torch.dtype) -> Sample:
        sample = build(dtype)
        args = (a.transpose(1, 2).contiguous().transpose(1, 2) for a in sample.args)
        return Sample(tuple(args), sample.kwargs)

    return rearranged


def reference(*args: Any, **kwargs: Any) -> Tensor:
    """torch's attention as it defines it: the composition whose gradients can be differentiated again."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _case(name: str, build: Callable[[torch.dtype], Sample], primary: bool = False) -> Case:
    return Case(
        "attention",
        name,
        F.scaled_dot_product_attention,
        reference,
        build,
        primary=primary,
        integers=False,
        # torch adds -inf to the scores of later keys, so that a NaN there spreads; here whole blocks are never read.
        same_nonfinite="causal" not in name,
    )


CASES = [
    _case("plain", _build((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)), primary=True),
    _case("causal_heads_inside_rows", _heads_inside_rows(_build(*((2, 3, 7, 8),) * 3, is_causal=True)), primary=True),
    _case("long", _build((1, 2, 203, 64), (1, 2, 421, 64), (1, 2, 421, 64))),
    _case("long_causal", _build((1, 3, 300, 16), (1, 3, 300, 16), (1, 3, 300, 24), is_causal=True)),
    _case(
        "generation", _build((2, 6, 1, 16), (2, 3, 300, 16), (2, 3, 300, 20), bool_mask=(2, 1, 1, 300), enable_gqa=True)
    ),
    _case("unbatched", _build((5, 17), (6, 17), (6, 3), scale=0.3)),
    _case("grouped_queries", _build((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), enable_gqa=True), primary=True),
    _case("bool_mask", _build((2, 2, 6, 8), (2, 2, 5, 8), (2, 2, 5, 4), bool_mask=(2, 1, 6, 5))),
    _case("padding_mask", _build((2, 2, 6, 8), (2, 2, 5, 8), (2, 2, 5, 8), bool_mask=(2, 1, 1, 5))),
    _case("float_mask", _build((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8), float_mask=(3, 4, 5)), primary=True),
    _case("long_float_mask", _build((2, 2, 150, 8), (2, 2, 260, 8), (2, 2, 260, 8), float_mask=(2, 1, 1, 260))),
    _case("broadcast_batch", _build((3, 1, 12, 8), (2, 9, 8), (3, 2, 9, 8))),
]


def _arguments() -> tuple[Tensor, ...]:
    args = _build((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 3), float_mask=(4, 5, 6))(torch.float32).args
    return tuple(a.requires_grad_() for a in args)


def _operator_arguments() -> tuple[Any, ...]:
    return (*_arguments(), 0.0, False, None, True)


def _backward_arguments() -> tuple[Any, ...]:
    inputs = _arguments()
    outputs = torch.ops.dlkernels.attention(*(a.detach() for a in inputs), 0.0, False, None, True)
    grad_output = torch.ones_like(outputs[0]).requires_grad_()
    return (grad_output, *inputs, *outputs, 0.0, False, None, True, [True, True, False, True])


OPERATOR_SAMPLES = [
    ("attention", _operator_arguments),
    ("attention_backward", _backward_arguments),
]

OPINFO = [
    OpInfoEntry(
        "attention",
        "nn.functional.scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        is_random=lambda sample: sample.kwargs.get("dropout_p", 0.0) > 0,
        rounds_factors=True,
    )
]
