"""What is particular to linear_cross_entropy: memory, the K-dimensional loss, errors, its Function and its module."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlkernels import functional as F
from dlkernels import nn
from dlkernels.ops.linear_cross_entropy import LinearCrossEntropyFunction

from .cases import normal

ROOT = Path(__file__).resolve().parent.parent
needs_torch_s = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss to compare with"
)


def reference(input: Tensor, linear_weight: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """Through the logits."""
    bias = kwargs.pop("linear_bias", None)
    logits = input @ linear_weight.flatten(0, -2).mT
    if bias is not None:
        logits = logits + bias.flatten()
    logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    return torch.nn.functional.cross_entropy(logits, target, **kwargs)


def value_and_gradients(function: Any, tensors: list[Tensor | None], target: Tensor, **kwargs: Any) -> list[Tensor]:
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **kwargs)
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def operands(
    rows: int, features: int, classes: int, *positions: int, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    return [
        normal(rows, features, seed=1, dtype=dtype),
        normal(classes, *positions, features, seed=2, dtype=dtype),
        normal(classes, *positions, seed=3, dtype=dtype),
    ]


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, torch
from dlkernels import functional as F
rows, classes, features = 2048, 20000, 64
input = torch.randn(rows, features, requires_grad=True)
weight = torch.randn(classes, features, requires_grad=True)
target = torch.randint(classes, (rows,))
weight.grad, input.grad = torch.zeros_like(weight), torch.zeros_like(input)
F.linear_cross_entropy(input[:8], weight[:8], target[:8] % 8).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
F.linear_cross_entropy(input, weight, target).backward()
gradients = (weight.numel() + input.numel()) * 4
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - gradients, rows * classes * 4)
"""


def test_memory_stays_below_a_tenth_of_the_logits_and_a_chunk() -> None:
    """Beside the gradients: two chunks of 768 classes, 12.6 MB at any number of classes, and a few copies of input."""
    measured = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
    extra, logits = map(int, measured.stdout.split())
    assert extra < 0.1 * logits + 12.6e6, f"{extra / 1e6:.1f} MB beside logits of {logits / 1e6:.1f} MB"


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_large_common_offset_costs_no_accuracy(offset: float, smoothing: float, isa: str) -> None:
    input, weight, bias = operands(20, 3, 700)
    assert bias is not None
    exact = [(t * 4).round() / 4 if t is not None else t for t in (input, weight, bias)]
    exact[2] = exact[2] + offset
    target = torch.arange(20) * 30
    actual = value_and_gradients(
        F.linear_cross_entropy, [t.float() for t in exact], target, reduction="none", label_smoothing=smoothing
    )
    expected = value_and_gradients(reference, exact, target, reduction="none", label_smoothing=smoothing)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e.float(), rtol=5e-6, atol=2e-6)


def test_all_rows_ignored() -> None:
    target = torch.full((4,), -100)
    tensors = operands(4, 3, 5)
    for reduction in ("mean", "sum", "none"):
        loss, *grads = value_and_gradients(F.linear_cross_entropy, tensors, target, reduction=reduction)
        assert loss.isnan() if reduction == "mean" else torch.equal(loss, torch.zeros_like(loss))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("sizes", [(0, 3, 5), (4, 0, 5), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_sizes(sizes: tuple[int, int, int], reduction: str) -> None:
    rows, features, classes = sizes
    tensors, target = operands(rows, features, classes), torch.zeros(rows, dtype=torch.int64)
    actual = value_and_gradients(F.linear_cross_entropy, tensors, target, reduction=reduction)
    expected = value_and_gradients(reference, tensors, target, reduction=reduction)
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_only_the_gradients_asked_for() -> None:
    input, weight, bias = operands(9, 4, 300)
    target = torch.arange(9)
    expected = value_and_gradients(F.linear_cross_entropy, [input, weight, bias], target)[1:]
    for position in range(3):
        tensors = [t.detach() for t in (input, weight, bias)]
        tensors[position].requires_grad_()
        F.linear_cross_entropy(tensors[0], tensors[1], target, linear_bias=tensors[2]).backward()
        assert torch.equal(tensors[position].grad, expected[position])
        tensors[position].requires_grad_(False).grad = None
    probabilities = torch.full((9, 300), 1 / 300, dtype=torch.float64, requires_grad=True)
    F.linear_cross_entropy(input.detach(), weight.detach(), probabilities).backward()
    log_p = (input @ weight.mT).log_softmax(1)
    torch.testing.assert_close(probabilities.grad, -log_p.detach() / 9)


@pytest.mark.parametrize("positions", [(3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_k_dimensional_losses(positions: tuple[int, ...], reduction: str, probabilities: bool) -> None:
    tensors, weight = operands(4, 6, 5, *positions), torch.arange(1.0, 6.0, dtype=torch.float64)
    if probabilities:
        target = normal(4, 5, *positions, seed=4, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(5, (4, *positions), generator=torch.Generator().manual_seed(4))
        target[1] = -100
    actual = value_and_gradients(F.linear_cross_entropy, tensors, target, weight=weight, reduction=reduction)
    expected = value_and_gradients(reference, tensors, target, weight=weight, reduction=reduction)
    if target.numel():
        torch.testing.assert_close(actual, expected)
    else:
        torch.testing.assert_close(actual[0], expected[0], equal_nan=True)


@given(data=st.data())
def test_any_call_gives_what_the_logits_give(data: st.DataObject) -> None:
    rows, features = data.draw(st.sampled_from([1, 3, 40, 270]), "rows"), data.draw(st.integers(1, 40), "features")
    classes = data.draw(st.sampled_from([1, 2, 17, 192, 400]), "classes")
    tensors = operands(rows, features, classes)
    if data.draw(st.booleans(), "no bias"):
        tensors[2] = None
    kwargs: dict[str, Any] = {
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]), "reduction"),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0]), "smoothing"),
    }
    if data.draw(st.booleans(), "weighted"):
        kwargs["weight"] = normal(classes, seed=2, dtype=torch.float64).abs() + 0.1
    if data.draw(st.booleans(), "probabilities"):
        target = normal(rows, classes, seed=3, dtype=torch.float64).softmax(1)
    else:
        target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(4))
    actual = value_and_gradients(F.linear_cross_entropy, tensors, target, **kwargs)
    torch.testing.assert_close(actual, value_and_gradients(reference, tensors, target, **kwargs))


def test_options_change_nothing() -> None:
    input, weight, bias = operands(9, 4, 30)
    expected = F.linear_cross_entropy(input, weight, torch.arange(9), linear_bias=bias)
    assert torch.equal(
        F.linear_cross_entropy(input, weight, torch.arange(9), linear_bias=bias, options=object()), expected
    )


@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
def test_autocast_rounds_the_layer_and_keeps_the_loss_in_float32(positions: tuple[int, ...]) -> None:
    input, weight, bias = operands(9, 16, 30, *positions, dtype=torch.float32)
    target = torch.zeros(9, *positions, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.linear_cross_entropy(input, weight, target, linear_bias=bias)
    rounded = [t.bfloat16().double() for t in (input, weight, bias)]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(rounded[0], rounded[1], target, linear_bias=rounded[2]).float())


# ---- errors ----------------------------------------------------------------------------------------------------------

INPUT, WEIGHT, TARGET = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 2])
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "input dimensions": ((INPUT[None], WEIGHT, TARGET), {}, RuntimeError, "input with dimensionality 1 or 2, got 3"),
    "weight dimensions": ((INPUT, WEIGHT[0], TARGET), {}, RuntimeError, "linear_weight with.*at least 2, got 1"),
    "features": ((INPUT, WEIGHT[:, 1:], TARGET), {}, RuntimeError, r"equal input and linear_weight.*got 4 and 3"),
    "bias": (
        (INPUT, WEIGHT, TARGET),
        {"linear_bias": torch.ones(4)},
        RuntimeError,
        r"linear_bias shape \(5,\), got \(4,\)",
    ),
    "bias type": ((INPUT, WEIGHT, TARGET), {"linear_bias": torch.ones(5).double()}, RuntimeError, "dtype|scalar type"),
    "weight type": ((INPUT, WEIGHT.double(), TARGET), {}, RuntimeError, "dtype|scalar type Float but found Double"),
    "class weight": ((INPUT, WEIGHT, TARGET), {"weight": torch.ones(4)}, RuntimeError, r"weight.*all 5 classes.*\[4\]"),
    "class weight type": ((INPUT, WEIGHT, TARGET), {"weight": torch.ones(5).double()}, RuntimeError, "Float.*Double"),
    "batch": ((INPUT, WEIGHT, TARGET[:2]), {}, ValueError, r"batch_size \(3\) to match target batch_size \(2\)"),
    "target above": ((INPUT, WEIGHT, TARGET + 3), {}, IndexError, "Target 5 is out of bounds"),
    "target type": ((INPUT, WEIGHT, TARGET.int()), {}, RuntimeError, "target dtype to be Long or Byte, but got Int"),
    "ignored": (
        (INPUT, WEIGHT, torch.zeros(3, 5)),
        {"ignore_index": 1},
        RuntimeError,
        "ignore_index cannot be specified",
    ),
    "reduction": ((INPUT, WEIGHT, TARGET), {"reduction": "max"}, ValueError, "max is not a valid value for reduction"),
    "unbatched": ((INPUT[0], WEIGHT[:, None], TARGET[:1]), {}, RuntimeError, r"requires batched input, \(N, 4\)"),
    "many outputs": ((INPUT, WEIGHT[:, None], TARGET), {}, RuntimeError, r"target.*size|[sS]ize.*target"),
    "many outputs batch": ((INPUT, WEIGHT[:, None], TARGET[:2, None]), {}, ValueError, r"target batch_size \(2\)"),
    "many outputs bias": (
        (INPUT, WEIGHT[:, None], TARGET[:, None]),
        {"linear_bias": torch.ones(5)},
        RuntimeError,
        r"linear_bias shape \(5, 1\), got \(5,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_got_and_what_was_expected(name: str) -> None:
    args, kwargs, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        F.linear_cross_entropy(*args, **kwargs)


@needs_torch_s
@pytest.mark.parametrize("name", ERRORS)
def test_torch_raises_the_same_type(name: str) -> None:
    args, kwargs, kind, _ = ERRORS[name]
    with pytest.raises(kind):
        torch.nn.functional.linear_cross_entropy(*args, **kwargs)


def test_gradients_for_the_weight_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        F.linear_cross_entropy(INPUT, WEIGHT, TARGET, weight=torch.ones(5, requires_grad=True))


# ---- autograd.Function and module ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reduction"), [(0, "none"), (1, "mean"), (2, "sum")])
def test_the_readable_function_equals_the_fast_one(code: int, reduction: str) -> None:
    tensors, target = operands(6, 4, 5, dtype=torch.float32), torch.tensor([0, 1, -100, 3, 4, 2])
    weight = torch.arange(1.0, 6.0)

    def readable(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor) -> Tensor:
        arguments = (input, linear_weight, linear_bias, target, weight, code, -100, 0.1)
        return LinearCrossEntropyFunction.apply(*arguments)[0]

    actual = value_and_gradients(readable, tensors, target)
    expected = value_and_gradients(
        F.linear_cross_entropy, tensors, target, weight=weight, reduction=reduction, label_smoothing=0.1
    )
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("out_features", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_module_keeps_its_state_through_copies(out_features: tuple[int, ...], bias: bool) -> None:
    module = nn.LinearCrossEntropyLoss(
        4, 5, out_features=out_features, bias=bias, weight=torch.arange(1.0, 6.0), label_smoothing=0.1
    )
    assert set(module.state_dict()) == {"weight", "linear.weight"} | ({"linear.bias"} if bias else set())
    input = normal(3, 4, seed=1, dtype=torch.float32)
    target = torch.zeros(3, *out_features, dtype=torch.int64)
    expected = module(input, target)
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(duplicate(input, target), expected)
    assert "num_classes=5" in repr(module) and "label_smoothing=0.1" in repr(module)


@needs_torch_s
def test_the_stand_in_for_older_torch_is_the_same_module() -> None:
    from dlkernels.nn.linear_cross_entropy import _LinearCrossEntropyLoss

    arguments = {"out_features": (2,), "bias": True, "label_smoothing": 0.1}
    stand_in, theirs = _LinearCrossEntropyLoss(4, 5, **arguments), torch.nn.LinearCrossEntropyLoss(4, 5, **arguments)
    stand_in.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(stand_in.state_dict(), strict=True)
    assert repr(stand_in) == "_" + repr(theirs)
