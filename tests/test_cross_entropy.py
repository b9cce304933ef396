"""What is particular to cross_entropy: its edges, its errors, its autograd.Function and its module."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlkernels import functional as F
from dlkernels import nn
from dlkernels.ops.cross_entropy import CrossEntropyFunction

from .cases import normal

reference = torch.nn.functional.cross_entropy


def value_and_gradient(function: Any, logits: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    loss.sum().backward()
    return [loss.detach(), leaf.grad]


def assert_like_torch(logits: Tensor, target: Tensor, **kwargs: Any) -> None:
    actual = value_and_gradient(F.cross_entropy, logits, target, **kwargs)
    expected = value_and_gradient(reference, logits, target, **kwargs)
    torch.testing.assert_close(actual, expected, equal_nan=True)


# ---- values at the edges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_large_common_offset_costs_no_accuracy(offset: float, isa: str) -> None:
    """Maximum and log-sum are kept apart; added up they would round the loss to a multiple of 0.001."""
    logits = (normal(64, 1000, seed=1, dtype=torch.float64) * 8).round() / 8 + offset  # exact in float32
    target = torch.arange(64) * 15
    actual = value_and_gradient(F.cross_entropy, logits.float(), target, reduction="none")
    expected = value_and_gradient(reference, logits, target, reduction="none")
    torch.testing.assert_close(actual, [e.float() for e in expected], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(("target", "expected"), [(0, 0.0), (1, 20000.0)])
def test_far_apart_logits_give_their_difference(target: int, expected: float, dtype: torch.dtype) -> None:
    loss = F.cross_entropy(torch.tensor([1e4, -1e4], dtype=dtype), torch.tensor(target))
    assert loss.item() == torch.tensor(expected, dtype=dtype).item()


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([math.inf, 0.0, 0.0], math.nan),
        ([-math.inf, 0.0, 0.0], math.inf),
        ([0.0, -math.inf, -math.inf], 0.0),
        ([-math.inf, -math.inf, -math.inf], math.nan),
        ([0.0, math.nan, 0.0], math.nan),
        ([3.4e38, -3.4e38, 0.0], 0.0),
        ([1e-45, 0.0, 0.0], math.log(3)),
    ],
    ids=str,
)
def test_extreme_logits(logits: list[float], expected: float, isa: str) -> None:
    loss = F.cross_entropy(torch.tensor([logits]), torch.tensor([0]))
    torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
    assert_like_torch(torch.tensor([logits]), torch.tensor([0]))


def test_all_rows_ignored() -> None:
    logits, target = normal(4, 5, seed=1, dtype=torch.float32), torch.full((4,), -100)
    assert F.cross_entropy(logits, target).isnan()
    assert F.cross_entropy(logits, target, reduction="sum").item() == 0
    assert torch.equal(F.cross_entropy(logits, target, reduction="none"), torch.zeros(4))
    for reduction in ("mean", "sum", "none"):
        assert torch.equal(
            value_and_gradient(F.cross_entropy, logits, target, reduction=reduction)[1], torch.zeros(4, 5)
        )


def test_ignored_rows_count_for_nothing() -> None:
    logits, target = normal(6, 5, seed=1, dtype=torch.float32), torch.tensor([1, 7, 3, 7, 0, 7])
    kept = target != 7
    loss, grad = value_and_gradient(F.cross_entropy, logits, target, ignore_index=7)
    expected_loss, expected_grad = value_and_gradient(F.cross_entropy, logits[kept], target[kept])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(grad[kept], expected_grad)
    assert torch.equal(grad[~kept], torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 2), (3, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches(shape: tuple[int, ...], reduction: str) -> None:
    target = torch.empty((shape[0], *shape[2:]), dtype=torch.int64)
    assert_like_torch(torch.empty(shape), target, reduction=reduction)


def test_zero_classes_leave_no_valid_target() -> None:
    with pytest.raises(IndexError, match="Target 0 is out of bounds"):
        F.cross_entropy(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64))
    assert F.cross_entropy(torch.empty(0, 0), torch.empty(0, dtype=torch.int64), reduction="sum").item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_one_class_is_certain(smoothing: float) -> None:
    logits = normal(5, 1, seed=1, dtype=torch.float32)
    loss, grad = value_and_gradient(F.cross_entropy, logits, torch.zeros(5).long(), label_smoothing=smoothing)
    assert loss.item() == 0 and torch.equal(grad, torch.zeros(5, 1))


def test_uint8_targets() -> None:
    assert_like_torch(normal(4, 5, seed=1, dtype=torch.float32), torch.tensor([0, 4, 2, 2], dtype=torch.uint8))


@pytest.mark.parametrize("legacy", [{"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_spellings_of_reduction(legacy: dict[str, bool]) -> None:
    assert_like_torch(normal(4, 5, seed=1, dtype=torch.float32), torch.tensor([0, 4, 2, 2]), **legacy)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_failed_allocation_leaves_everything_usable() -> None:
    logits = torch.zeros(1, requires_grad=True)
    huge = logits.expand(2**40, 2**10)
    target = torch.zeros(1, dtype=torch.int64).expand(2**40)
    with pytest.raises(RuntimeError, match="(?i)alloc|memory"):
        F.cross_entropy(huge, target)
    assert_like_torch(normal(4, 5, seed=1, dtype=torch.float32), torch.tensor([0, 4, 2, 2]))


# ---- errors ----------------------------------------------------------------------------------------------------------

LOGITS, TARGET = torch.zeros(3, 5), torch.tensor([0, 1, 2])
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "target above": ((LOGITS, torch.tensor([0, 5, 1])), {}, IndexError, "Target 5 is out of bounds"),
    "target below": ((LOGITS, torch.tensor([0, -1, 1])), {}, IndexError, "Target -1 is out of bounds"),
    "batch": ((LOGITS, torch.tensor([0, 1])), {}, ValueError, r"batch_size \(3\) to match target batch_size \(2\)"),
    "batch and weight": (
        (LOGITS, torch.tensor([0, 1])),
        {"weight": torch.ones(4)},
        ValueError,
        r"to match target batch_size \(2\)",
    ),
    "unbatched": ((LOGITS[0], TARGET), {}, ValueError, "1D target must have size 1, but got target size: 3"),
    "target shape": ((LOGITS, TARGET[:, None]), {}, RuntimeError, r"target.*\[3, 1\].*\[3, 5\]"),
    "images": ((torch.zeros(2, 5, 4), torch.zeros(2, 3).long()), {}, RuntimeError, r"size \[2, 4\], got \[2, 3\]"),
    "int32 target": ((LOGITS, TARGET.int()), {}, RuntimeError, "target dtype to be Long or Byte, but got Int"),
    "float target": ((LOGITS, TARGET.float()), {}, RuntimeError, "target dtype to be Long or Byte, but got Float"),
    "indices as probabilities": ((LOGITS, LOGITS.long()), {}, RuntimeError, "floating point type.*got Long"),
    "probabilities type": ((LOGITS, LOGITS.cfloat()), {}, RuntimeError, "Expected floating point type for target"),
    "probabilities ignored": ((LOGITS, LOGITS), {"ignore_index": 1}, RuntimeError, "ignore_index.*got 1"),
    "weight size": ((LOGITS, TARGET), {"weight": torch.ones(4)}, RuntimeError, r"weight.*all 5 classes.*\[4\]"),
    "weight type": (
        (LOGITS, TARGET),
        {"weight": torch.ones(5).double()},
        RuntimeError,
        "Float but found Double: weight",
    ),
    "smoothing": ((LOGITS, TARGET), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing.*Got: 1.5"),
    "reduction": ((LOGITS, TARGET), {"reduction": "max"}, ValueError, "max is not a valid value for reduction"),
    "scalar": ((torch.tensor(1.0), torch.tensor(0)), {}, RuntimeError, "input must have shape.*got a scalar"),
    "integers": ((LOGITS.long(), TARGET), {}, NotImplementedError, "input is Long, expected float32"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_got_and_what_was_expected(name: str) -> None:
    args, kwargs, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        F.cross_entropy(*args, **kwargs)


@pytest.mark.parametrize("name", [n for n in ERRORS if n not in ("probabilities type", "scalar", "smoothing")])
def test_torch_raises_the_same_type(name: str) -> None:
    args, kwargs, kind, _ = ERRORS[name]
    with pytest.raises(kind):
        reference(*args, **kwargs)


def test_gradients_for_the_weight_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        F.cross_entropy(LOGITS, TARGET, weight=torch.ones(5, requires_grad=True))


# ---- against torch on anything ---------------------------------------------------------------------------------------


@given(data=st.data())
def test_any_call_gives_what_torch_gives(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 70), "classes")
    shape = data.draw(st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 2)]), "rows")
    logits_shape = (classes, *shape)[:1] if not shape else (shape[0], classes, *shape[1:])
    logits = normal(*logits_shape, seed=data.draw(st.integers(0, 99), "seed"), dtype=torch.float64) * data.draw(
        st.sampled_from([0.1, 3.0, 50.0]), "scale"
    )
    kwargs: dict[str, Any] = {
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"]), "reduction"),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0]), "smoothing"),
    }
    if data.draw(st.booleans(), "weighted"):
        kwargs["weight"] = normal(classes, seed=2, dtype=torch.float64).abs() + 0.1
    if data.draw(st.booleans(), "probabilities"):
        target = normal(*logits_shape, seed=3, dtype=torch.float64).softmax(0 if not shape else 1)
    else:
        target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(4))
        kwargs["ignore_index"] = data.draw(st.sampled_from([-100, 0]), "ignore_index")
        if kwargs["ignore_index"] == 0 and bool((target == 0).all()):
            kwargs["reduction"] = "sum"  # 0 / 0 otherwise, which torch decides by the path it takes
    assert_like_torch(logits, target, **kwargs)


# ---- autograd.Function and module ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reduction"), [(0, "none"), (1, "mean"), (2, "sum")])
def test_the_readable_function_equals_the_fast_one(code: int, reduction: str) -> None:
    logits, weight = normal(6, 5, seed=1, dtype=torch.float32), torch.arange(1.0, 6.0)
    target = torch.tensor([0, 1, -100, 3, 4, 2])

    def readable(leaf: Tensor) -> Tensor:
        return CrossEntropyFunction.apply(leaf, target, weight, code, -100, 0.1)[0]

    def fast(leaf: Tensor) -> Tensor:
        return F.cross_entropy(leaf, target, weight=weight, reduction=reduction, label_smoothing=0.1)

    for a, b in zip(value_and_gradient(readable, logits), value_and_gradient(fast, logits), strict=True):
        assert torch.equal(a, b)


def test_module_keeps_its_arguments_through_copies() -> None:
    module = nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0), ignore_index=2, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(torch.ones(5), ignore_index=2, reduction="sum", label_smoothing=0.1)
    theirs.load_state_dict(module.state_dict(), strict=True)
    assert repr(module) == "CrossEntropyLoss()"
    expected = theirs(normal(3, 5, seed=1, dtype=torch.float32), TARGET)
    for duplicate in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(duplicate, torch.nn.CrossEntropyLoss)
        torch.testing.assert_close(duplicate(normal(3, 5, seed=1, dtype=torch.float32), TARGET), expected)
