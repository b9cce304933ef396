"""override takes of a function of torch what torch takes: what torch refuses is refused, in torch's words."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dlkernels

PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "torch.mm": torch.mm,
    "Tensor.mm": Tensor.mm,
    "torch.matmul": torch.matmul,
    "Tensor.matmul": Tensor.matmul,
    "@": lambda a, b: a @ b,
    "torch.bmm": torch.bmm,
    "linear": F.linear,
}
WITH_BIAS: dict[str, Callable[..., Tensor]] = {
    "torch.addmm": torch.addmm,
    "Tensor.addmm": Tensor.addmm,
    "torch.baddbmm": torch.baddbmm,
    "linear": lambda bias, input, weight: F.linear(input, weight, bias),
}
SHAPES = [
    (),
    (0,),
    (1,),
    (3,),
    (4,),
    (0, 3),
    (3, 0),
    (1, 3),
    (2, 3),
    (3, 3),
    (3, 4),
    (2, 2, 3),
    (2, 3, 3),
    (1, 2, 2, 3),
]
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64)


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Shape and type of the result, or type and words of the error."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return result.shape, result.dtype, result.layout


def assert_same_outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    expected = outcome(function, *args, **kwargs)
    with dlkernels.override():
        found = outcome(function, *args, **kwargs)
    described = [(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args]
    assert found == expected, (described, kwargs)


def filled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_any_two_shapes(name: str) -> None:
    for a, b in itertools.product(SHAPES, repeat=2):
        assert_same_outcome(PRODUCTS[name], filled(a), filled(b))


@pytest.mark.parametrize("name", WITH_BIAS)
def test_products_with_a_bias_of_any_shapes(name: str) -> None:
    for bias, a, b in itertools.product(
        [(), (1,), (3,), (4,), (2, 4), (2, 1), (1, 4), (2, 2, 4)], SHAPES[5:], SHAPES[5:]
    ):
        assert_same_outcome(WITH_BIAS[name], filled(bias), filled(a), filled(b))


@pytest.mark.parametrize("name", [*PRODUCTS, *WITH_BIAS])
def test_products_of_any_types(name: str) -> None:
    count = 2 if name in PRODUCTS else 3
    function = PRODUCTS.get(name) or WITH_BIAS[name]
    shapes = [(3, 3), (3, 3)] if count == 2 else [(3,), (3, 3), (3, 3)]
    for types in itertools.product(TYPES, repeat=count):
        assert_same_outcome(function, *(filled(s, t) for s, t in zip(shapes, types, strict=True)))


def test_a_product_into_a_result_that_is_given() -> None:
    a, b, bias = torch.randn(2, 3), torch.randn(3, 4), torch.randn(4)
    for function, args in ((torch.mm, (a, b)), (torch.matmul, (a, b)), (torch.addmm, (bias, a, b))):
        out = torch.empty(2, 4)
        with dlkernels.override():
            assert function(*args, out=out) is out
        torch.testing.assert_close(out, function(*args))
    for function in (torch.addmm, Tensor.addmm):
        with dlkernels.override():
            found = function(bias, a, b, beta=0.5, alpha=2)
        torch.testing.assert_close(found, 0.5 * bias + 2 * (a @ b))
    assert_same_outcome(Tensor.addmm_, bias.expand(2, 4).clone(), a, b)
    assert_same_outcome(Tensor.addmm_, bias, a, b)


def test_sparse_matrices_are_torchs() -> None:
    for name in ("torch.mm", "torch.matmul", "@"):
        assert_same_outcome(PRODUCTS[name], torch.eye(3).to_sparse(), torch.randn(3, 4))
        assert_same_outcome(PRODUCTS[name], torch.randn(4, 3), torch.eye(3).to_sparse())


X, W = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
CONVOLUTIONS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(
        ((filled(a), filled(b)), {})
        for a in [(4, 5, 5), (2, 4, 5, 5), (2, 4, 5), (1, 2, 4, 5, 5), (4,)]
        for b in [(6, 4, 3, 3), (6, 2, 3, 3), (6, 4, 3), (6, 4, 7, 7), (1, 6, 4, 3, 3), (0, 4, 3, 3)]
    ),
    *(
        ((X, W), {name: value})
        for name in ("stride", "padding", "dilation")
        for value in (0, -1, 1, 2, (1, 2), [2], (1, 2, 3), (), 1.0, "same", "valid", "full", None, True)
    ),
    *(((X, W), {"groups": groups}) for groups in (0, -1, 1, 2, 3, 4, 1.0)),
    *(((X, W, filled(shape)), {}) for shape in [(), (1,), (6,), (5,), (6, 1)]),
    *(((X.to(a), W.to(b)), {}) for a in TYPES for b in TYPES),
]


def test_convolutions() -> None:
    for args, kwargs in CONVOLUTIONS:
        assert_same_outcome(F.conv2d, *args, **kwargs)


NORMS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(
        ((filled(shape), filled((4,)), filled((4,))), {"training": training})
        for shape in [(), (4,), (2, 4), (1, 4), (0, 4), (2, 3), (2, 4, 0), (2, 4, 3), (2, 4, 1, 1, 1, 2)]
        for training in (False, True)
    ),
    *(
        ((X, mean, var), {"training": training})
        for mean in (None, filled((4,)), filled((3,)), filled((4,), torch.int64))
        for var in (None, filled((4,)), filled((4,), torch.float64))
        for training in (False, True)
    ),
    *(
        ((X, filled((4,)), filled((4,)), weight, bias), {})
        for weight in (None, filled((4,)), filled((5,)), filled((2, 2)))
        for bias in (None, filled((4,)), filled((4,), torch.bfloat16))
    ),
    *(((X.to(dtype), filled((4,)), filled((4,))), {}) for dtype in TYPES),
    *(((X, filled((4,)), filled((4,))), {"eps": eps, "training": t}) for eps in (0.0, -1.0, 1) for t in (False, True)),
    *(((X, filled((4,)), filled((4,))), {"momentum": m, "training": t}) for m in (0.0, 1, 2.0) for t in (False, True)),
]


def test_batch_norms() -> None:
    for args, kwargs in NORMS:
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        assert_same_outcome(F.batch_norm, *copies, **kwargs)


LOGITS = torch.randn(4, 3)
CLASSES = torch.tensor([0, 1, 2, 1])
LOSSES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(
        ((filled(a), filled(b, torch.int64)), {})
        for a in [(), (3,), (4, 3), (4, 3, 2), (0, 3)]
        for b in [(), (1,), (3,), (4,), (4, 2), (4, 3), (0,)]
    ),
    *(((filled(a), filled(b)), {}) for a in [(3,), (4, 3), (4, 3, 2)] for b in [(), (3,), (4,), (4, 3), (4, 3, 2)]),
    *(((LOGITS.to(a), CLASSES.to(b)), {}) for a in TYPES for b in (*TYPES, torch.uint8, torch.int32, torch.bool)),
    *(
        ((LOGITS, CLASSES, weight), {})
        for weight in (None, filled((3,)), filled((4,)), filled((3, 1)), filled((3,), torch.float64))
    ),
    *(((LOGITS, CLASSES), {"reduction": r}) for r in ("none", "mean", "sum", "batchmean", None, 1)),
    *(((LOGITS, CLASSES), {"label_smoothing": s}) for s in (0.0, 1.0, 1.5, -0.1)),
    *(((LOGITS, torch.full((4,), c)), {"ignore_index": i}) for c in (-1, 3, -100, 2) for i in (-100, -1, 3)),
]


def test_losses() -> None:
    for args, kwargs in LOSSES:
        assert_same_outcome(F.cross_entropy, *args, **kwargs)


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return filled(shape, dtype)


QUERIES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(
        ((filled(q), filled(k), filled(v)), {})
        for q in [(8,), (5, 8), (2, 5, 8), (3, 2, 5, 8)]
        for k in [(8,), (7, 8), (2, 7, 8), (3, 2, 7, 8), (3, 1, 7, 8), (2, 7, 9)]
        for v in [(7, 8), (2, 7, 8), (3, 2, 7, 6), (2, 6, 8)]
    ),
    *(
        ((heads(2, 5, 8), heads(2, 7, 8), heads(2, 7, 8), mask), {"is_causal": causal})
        for mask in (
            None,
            filled((5, 7)),
            filled((5, 7), torch.bool),
            filled((4, 7)),
            filled((5, 7), torch.float64),
            filled((3, 2, 5, 7)),
        )
        for causal in (False, True)
    ),
    *(((heads(2, 5, 8),) * 3, {"dropout_p": p}) for p in (0.0, 1.0, -0.5, 1.5)),
    *(((heads(2, 5, 8),) * 3, {"scale": s}) for s in (None, 0.0, -1.0, 2)),
    *(
        ((heads(1, h, 5, 8), heads(1, kv, 5, 8), heads(1, kv, 5, 8)), {"enable_gqa": gqa})
        for h, kv in ((4, 2), (4, 3), (2, 4), (4, 4))
        for gqa in (False, True)
    ),
    *(((heads(2, 5, 8, dtype=a), heads(2, 5, 8, dtype=b), heads(2, 5, 8, dtype=b)), {}) for a in TYPES for b in TYPES),
]


def test_attentions() -> None:
    for args, kwargs in QUERIES:
        assert_same_outcome(F.scaled_dot_product_attention, *args, **kwargs)
