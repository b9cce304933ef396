"""Tensor subclasses: functions and converted modules give what torch gives for them, and keep their types."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

import dlkernels
from dlkernels import _C, functional, nn

from ..cases import Case, call, outputs_of, primary_cases

cases = pytest.mark.parametrize("case", primary_cases(), ids=str)


class Named(Tensor):
    """Differs from ``Tensor`` in its type alone, which torch's functions keep."""


class Loud(Tensor):
    """Sees every function that it is an argument of."""

    seen: list[Any] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Scaled(Tensor):
    """Holds half of its values and knows torch's operators only, as quantised tensors do: the kind that asks in
    ``__torch_dispatch__`` alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, half: Tensor, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, half.shape, strides=half.stride(), dtype=half.dtype, device=half.device, requires_grad=requires_grad
        )

    def __init__(self, half: Tensor, requires_grad: bool = False) -> None:
        self.half = half

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            raise NotImplementedError(f"Scaled knows nothing of {func}")
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(func(args[0].half)))

        def whole(value: Any) -> Any:
            return 2 * value.half if isinstance(value, cls) else value

        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))


class ScaledByFunction(Scaled):
    """The kind that also has a table of functions: what is not in it is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dlkernels" in getattr(func, "__module__", "dlkernels" if "dlkernels" in str(func) else ""):
            raise NotImplementedError(f"ScaledByFunction knows nothing of {func}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


def as_named(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Named)


def as_loud(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Loud)


def as_scaled(tensor: Tensor) -> Tensor:
    return Scaled(tensor / 2)


def as_scaled_by_function(tensor: Tensor) -> Tensor:
    return ScaledByFunction(tensor / 2)


def as_two(tensor: Tensor) -> Tensor:
    return TwoTensor(tensor, tensor.clone())


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "named": as_named,
    "loud": as_loud,
    "dispatch": as_scaled,
    "function and dispatch": as_scaled_by_function,
    "two": as_two,
}


def plain(value: Any) -> Any:
    if isinstance(value, Scaled):
        return 2 * value.half
    if isinstance(value, TwoTensor):
        return value.a
    return value.as_subclass(Tensor) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("kind", KINDS)
@cases
def test_an_argument_of_a_subclass_gives_what_torch_gives(case: Case, kind: str) -> None:
    positions = case.build(torch.float64).differentiable()
    for position in [positions[0], positions[-1]]:
        sample = case.build(torch.float64)
        args = list(sample.args)
        args[position] = KINDS[kind](args[position])
        sample.args = tuple(args)
        try:
            expected = call(case.reference, sample)
        except (NotImplementedError, RuntimeError) as error:  # torch has no such operator for some subclasses either
            with pytest.raises(type(error)):
                call(case.function, sample)
            continue
        found = call(case.function, sample)
        assert [type(t) for t in found] == [type(t) for t in expected], position
        torch.testing.assert_close(list(map(plain, found)), list(map(plain, expected)))


@cases
def test_gradients_flow_to_a_subclass(case: Case) -> None:
    def gradient(function: Callable[..., Any]) -> Tensor:
        sample = case.build(torch.float64)
        leaf = as_named(sample.args[0]).requires_grad_()
        outputs = outputs_of(function(leaf, *sample.args[1:], **sample.kwargs))
        return torch.autograd.grad(sum((o.square().sum() for o in outputs), torch.zeros(())), leaf)[0]

    torch.testing.assert_close(plain(gradient(case.function)), plain(gradient(case.reference)))


@cases
def test_functions_of_torch_are_what_a_subclass_sees(case: Case) -> None:
    sample = case.build(torch.float64)
    Loud.seen.clear()
    case.function(as_loud(sample.args[0]), *sample.args[1:], **sample.kwargs)
    assert Loud.seen
    assert not [f for f in Loud.seen if "dlkernels" in str(getattr(f, "__module__", ""))]


@cases
def test_subclasses_without_protocols_run_here(case: Case) -> None:
    """Such as the flat parameters of sharded training."""

    class Storage(torch.nn.Parameter):
        pass

    operators: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operators.append(func.namespace)
            return func(*args, **kwargs or {})

    sample = case.build(torch.float64)
    with Watch():
        case.function(Storage(sample.args[0], False), *sample.args[1:], **sample.kwargs)
    assert "dlkernels" in operators


@pytest.mark.parametrize("kind", ["named", "dispatch", "function and dispatch"])
def test_override_counts_subclasses_as_torchs(kind: str) -> None:
    x, weight = torch.randn(3, 4), torch.nn.Parameter(KINDS[kind](torch.randn(5, 4)), requires_grad=False)
    with dlkernels.override() as log:
        through_torch = torch.nn.functional.linear(x, weight)
        through_ours = functional.linear(x, weight)
    torch.testing.assert_close(plain(through_torch), plain(through_ours))
    assert {(entry.operation, entry.reason) for entry in log.fallbacks} == {
        ("linear", f"tensors of type {type(weight).__name__}")
    }
    assert log.calls == {}


def model() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2)
    ).eval()


LAYERS: list[tuple[torch.nn.Module, tuple[Tensor, ...]]] = [
    (model(), (torch.randn(2, 3, 4, 4),)),
    (torch.nn.LSTMCell(3, 4), (torch.randn(2, 3),)),
    (torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True), (torch.randn(5, 2, 3),)),
    (torch.nn.MultiheadAttention(8, 2, batch_first=True).train(), (torch.randn(2, 5, 8),) * 3),
    (torch.nn.CrossEntropyLoss(), (torch.randn(4, 3), torch.tensor([0, 2, 1, 0]))),
]


@pytest.mark.parametrize(("module", "inputs"), LAYERS, ids=lambda value: type(value).__name__)
def test_converted_modules_keep_the_type_of_their_input(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    first = as_named(inputs[0])
    arguments = [first if value is inputs[0] else value for value in inputs]
    expected, found = (outputs_of(m(*arguments)) for m in (module, dlkernels.convert(copy.deepcopy(module))))
    assert [type(t) for t in found] == [type(t) for t in expected]
    torch.testing.assert_close(list(map(plain, found)), list(map(plain, expected)))


@pytest.mark.parametrize("kind", ["dispatch", "function and dispatch"])
def test_converted_modules_compute_with_quantised_weights(kind: str) -> None:
    network, images = model(), torch.randn(2, 3, 4, 4)
    expected = network(images)
    converted = dlkernels.convert(network)
    for module in converted.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.weight = torch.nn.Parameter(KINDS[kind](module.weight.detach()), requires_grad=False)
    assert isinstance(converted[0].weight, Scaled)
    torch.testing.assert_close(converted(images), expected)


def test_a_linear_layer_of_two_tensors_is_compiled_whole() -> None:
    layer = nn.Linear(4, 3)
    two = as_two(torch.randn(2, 4))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(two).a, layer(two.a))


def test_symbolic_tracing_records_our_functions() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            images = functional.conv2d(x, weight, padding=1)
            normed = functional.batch_norm(images, None, None, training=True, activation="relu")
            attended = functional.scaled_dot_product_attention(normed, normed, normed, is_causal=True)
            return functional.cross_entropy(functional.linear(attended, attended[0, 0]), attended.argmax(1))

    block, x, weight = Block(), torch.randn(2, 3, 5, 5), torch.randn(3, 3, 3, 3)
    traced = torch.fx.symbolic_trace(block)
    recorded = [node.target for node in traced.graph.nodes if "dlkernels" in getattr(node.target, "__module__", "")]
    assert recorded == [
        functional.conv2d,
        functional.batch_norm,
        functional.scaled_dot_product_attention,
        functional.linear,
        functional.cross_entropy,
    ]
    assert torch.equal(traced(x, weight), block(x, weight))


def test_other_modes_stay_out_of_the_way() -> None:
    """A mode makes torch's own check say yes for plain tensors."""
    with torch.device("meta"):
        assert functional.linear(torch.ones(2, 3), torch.ones(4, 3)).is_meta
        assert not _C.is_special(torch.ones(2), None)


@pytest.mark.parametrize("value", [1, 2.5, "x", [1.0], torch.ones(2).as_subclass(Named)])
def test_special_values_are_told_from_tensors(value: Any) -> None:
    assert _C.is_special(torch.ones(2), value)
    assert not _C.is_special(torch.ones(2), torch.nn.Parameter(torch.ones(2)), None, torch.nn.Buffer(torch.ones(2)))
