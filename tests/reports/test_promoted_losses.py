"""Class probabilities and class weights of another type than the logits: losses are promoted as torch promotes them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dlkernels
from dlkernels import functional as F
from dlkernels import nn

torch_functional = torch.nn.functional

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHTS = (None, *FLOATING, torch.int64)
Loss = Callable[..., Tensor]


def name_of(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def types_and_values(loss: Loss, tensors: list[Tensor], weight: Tensor | None) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
    result = loss(*leaves, weight)
    grads = torch.autograd.grad(result.sum(), [leaf for leaf in leaves if leaf.requires_grad])
    return [result, *grads]


def check(ours: Loss, torchs: Loss, tensors: list[Tensor], weight: Tensor | None) -> None:
    """Types are torch's; values are as near to those in float64 as torch's, or as roundings of their type make them."""
    expected = types_and_values(torchs, tensors, weight)
    found = types_and_values(ours, tensors, weight)
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    exact = types_and_values(torchs, wide, None if weight is None else weight.double())
    for ours_value, torchs_value, value in zip(found, expected, exact, strict=True):
        error, error_of_torch = ((v.double() - value).abs().max() for v in (ours_value, torchs_value))
        rounding = torch.finfo(ours_value.dtype).eps * value.abs().max()
        assert error <= 2 * error_of_torch + 4 * rounding


def loss_of(f: Loss, reduction: str, label_smoothing: float) -> Loss:
    return lambda logits, target, weight: f(
        logits, target, weight, reduction=reduction, label_smoothing=label_smoothing
    )


def layer_loss_of(f: Loss, reduction: str, bias: bool) -> Loss:
    if bias:
        return lambda x, w, b, target, weight: f(x, w, target, linear_bias=b, weight=weight, reduction=reduction)
    return lambda x, w, target, weight: f(x, w, target, weight=weight, reduction=reduction)


def class_weights(dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else torch.randint(1, 5, (5,)).to(dtype)


@pytest.mark.parametrize("weight", WEIGHTS, ids=name_of)
@pytest.mark.parametrize("target", FLOATING, ids=name_of)
@pytest.mark.parametrize("logits", FLOATING, ids=name_of)
def test_class_probabilities_of_any_type(logits: torch.dtype, target: torch.dtype, weight: torch.dtype | None) -> None:
    for shape, (reduction, smoothing) in itertools.product(
        [(5,), (3, 5), (2, 5, 3)], [("mean", 0.0), ("none", 0.1), ("sum", 0.0)]
    ):
        tensors = [torch.randn(shape).to(logits), torch.rand(shape).to(target)]
        ours, torchs = (loss_of(f, reduction, smoothing) for f in (F.cross_entropy, torch_functional.cross_entropy))
        check(ours, torchs, tensors, class_weights(weight))


@pytest.mark.parametrize("weight", WEIGHTS, ids=name_of)
@pytest.mark.parametrize("target", FLOATING, ids=name_of)
@pytest.mark.parametrize("layer", FLOATING, ids=name_of)
def test_class_probabilities_of_any_type_for_a_layer(
    layer: torch.dtype, target: torch.dtype, weight: torch.dtype | None
) -> None:
    for positions, reduction, bias in [((), "mean", True), ((), "none", False), ((2,), "mean", True)]:
        tensors = [torch.randn(3, 4), torch.randn(5, *positions, 4), *([torch.randn(5, *positions)] if bias else [])]
        tensors = [tensor.to(layer) for tensor in tensors] + [torch.rand(3, 5, *positions).to(target)]
        ours, torchs = (
            layer_loss_of(f, reduction, bias) for f in (F.linear_cross_entropy, torch_functional.linear_cross_entropy)
        )
        check(ours, torchs, tensors, class_weights(weight))


@pytest.mark.parametrize("weight", WEIGHTS[1:], ids=name_of)
@pytest.mark.parametrize("logits", FLOATING, ids=name_of)
def test_weights_beside_class_indices_have_the_type_of_the_logits(logits: torch.dtype, weight: torch.dtype) -> None:
    arguments = (torch.randn(3, 5).to(logits), torch.tensor([0, 2, 4]), class_weights(weight))
    layer = (torch.randn(3, 4).to(logits), torch.randn(5, 4).to(logits), arguments[1])
    calls: list[Callable[[], Tensor]] = [
        lambda: F.cross_entropy(*arguments),
        lambda: F.linear_cross_entropy(*layer, weight=arguments[2]),
    ]
    for call in calls:
        if logits == weight:
            assert call().dtype == logits
        else:
            with pytest.raises(RuntimeError, match="expected scalar type"):
                call()


MIXED = [
    (torch.bfloat16, torch.float32, None),
    (torch.float16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.float32, torch.float64),
]


def calls(logits: torch.dtype, target: torch.dtype, weight: torch.dtype | None) -> list[tuple[Loss, Loss, list]]:
    """Ours, torch's, and the arguments of both."""
    x, probabilities = torch.randn(3, 5).to(logits), torch.rand(3, 5).to(target)
    rows, matrix, several = torch.randn(3, 4).to(logits), torch.randn(5, 4).to(logits), torch.randn(5, 2, 4).to(logits)
    weights = class_weights(weight)
    many = torch.rand(3, 5, 2).to(target)

    def layer(f: Loss) -> Loss:
        return lambda x, w, t, weight: f(x, w, t, weight=weight)

    both = [layer(f) for f in (F.linear_cross_entropy, torch_functional.linear_cross_entropy)]
    return [
        (F.cross_entropy, torch_functional.cross_entropy, [x, probabilities, weights]),
        (*both, [rows, matrix, probabilities, weights]),
        (*both, [rows, several, many, weights]),
    ]


@pytest.mark.parametrize("types", MIXED, ids=lambda types: "_".join(map(name_of, types)))
def test_every_way_in_promotes(isa: str, types: tuple[torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    for ours, torchs, arguments in calls(*types):
        expected = torchs(*arguments)
        on_meta = [None if a is None else a.to("meta") for a in arguments]
        with torch._subclasses.FakeTensorMode() as mode:
            fake = ours(*(None if a is None else mode.from_tensor(a) for a in arguments))
        assert fake.dtype == ours(*on_meta).dtype == expected.dtype
        with dlkernels.override() as log:
            overridden = torchs(*arguments)
        assert not log.fallbacks
        for found in (ours(*arguments), overridden):
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(*arguments).dtype == torchs(*arguments).dtype


@pytest.mark.parametrize("types", MIXED, ids=lambda types: "_".join(map(name_of, types)))
def test_compiled_losses_promote(types: tuple[torch.dtype, torch.dtype, torch.dtype | None]) -> None:
    torch._dynamo.reset()
    for ours, _, arguments in calls(*types):
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        leaves = [[a.clone().requires_grad_() for a in arguments[:-1]] for _ in range(2)]
        results = [f(*tensors, arguments[-1]) for f, tensors in zip((ours, compiled), leaves, strict=True)]
        assert results[0].dtype == results[1].dtype
        grads = [torch.autograd.grad(result, tensors) for result, tensors in zip(results, leaves, strict=True)]
        for a, b in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
            assert torch.equal(a, b)


def test_modules_promote() -> None:
    x, target = torch.randn(3, 5, dtype=torch.bfloat16), torch.rand(3, 5)
    assert nn.CrossEntropyLoss()(x, target).dtype == torch.float32
    assert nn.CrossEntropyLoss(weight=torch.rand(5).double())(x, target).dtype == torch.float64
