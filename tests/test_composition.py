"""Every operation under everything that torch wraps around an operation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .cases import (
    Case,
    Sample,
    all_cases,
    call,
    gradients,
    operator_samples,
    outputs_of,
    primary_cases,
    skipped_without_reference,
)

cases = pytest.mark.parametrize("case", all_cases(), ids=str)
primary = pytest.mark.parametrize("case", primary_cases(), ids=str)


def loss_of(case: Case, sample: Sample) -> Tensor:
    return sum((o.float().square().sum() for o in call(case.function, sample)), torch.zeros(()))


def leaf_gradients(sample: Sample) -> list[Tensor | None]:
    return [sample.args[i].grad for i in sample.differentiable()]


def assert_equal(actual: list[Any], expected: list[Any]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@primary
def test_compiles_whole_and_trains_the_same(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    eager, compiled_sample = case.build(torch.float32).requiring_grad(), case.build(torch.float32).requiring_grad()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = call(case.function, eager)
    actual = call(compiled, compiled_sample)
    assert_equal(actual, expected)
    assert_equal(gradients(actual, compiled_sample), gradients(expected, eager))


@primary
def test_compiles_whole_for_inference(case: Case) -> None:
    torch._dynamo.reset()
    sample = case.build(torch.float32)
    compiled = torch.compile(case.function, fullgraph=True, backend="inductor")
    with torch.no_grad():
        assert_equal(call(compiled, sample), call(case.function, sample))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@primary
def test_exports(case: Case, strict: bool) -> None:
    sample = case.build(torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return case.function(*args, **sample.kwargs)

    program = torch.export.export(Module(), sample.args, strict=strict)
    assert_equal(outputs_of(program.module()(*sample.args)), call(case.function, sample))


@cases
def test_meta_tensors_give_shapes_types_and_strides(case: Case) -> None:
    sample = case.build(torch.float32)

    def to_meta(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    meta = Sample(tuple(map(to_meta, sample.args)), {k: to_meta(v) for k, v in sample.kwargs.items()})
    for actual, expected in zip(call(case.function, meta), call(case.function, sample), strict=True):
        assert actual.device.type == "meta"
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())


@primary
def test_traces_with_make_fx(case: Case) -> None:
    sample = case.build(torch.float32)

    leaves, structure = tree_flatten((sample.args, sample.kwargs))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in positions]

    def function(*values: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for position, value in zip(positions, values, strict=True):
            filled[position] = value
        args, kwargs = tree_unflatten(filled, structure)
        return call(case.function, Sample(args, kwargs))

    graph = make_fx(function, tracing_mode="fake")(*tensors)
    assert any("dlkernels" in str(node.target) for node in graph.graph.nodes)
    assert_equal(graph(*tensors), call(case.function, sample))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@primary
def test_recomputes_under_activation_checkpointing(case: Case, use_reentrant: bool) -> None:
    plain, recomputed = case.build(torch.float32).requiring_grad(), case.build(torch.float32).requiring_grad()
    loss_of(case, plain).backward()
    checkpoint(
        lambda *args: loss_of(case, Sample(args, recomputed.kwargs)), *recomputed.args, use_reentrant=use_reentrant
    ).backward()
    assert_equal(leaf_gradients(recomputed), leaf_gradients(plain))


@primary
def test_runs_under_compiled_autograd(case: Case) -> None:
    torch._dynamo.reset()
    plain, compiled = case.build(torch.float32).requiring_grad(), case.build(torch.float32).requiring_grad()
    loss_of(case, plain).backward()

    def compiler(graph: torch.fx.GraphModule) -> Callable[..., Any]:
        return torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=True)

    with torch._dynamo.compiled_autograd._enable(compiler):
        loss_of(case, compiled).backward()
    torch.testing.assert_close(leaf_gradients(compiled), leaf_gradients(plain))


@cases
def test_second_gradients_are_those_of_torch(case: Case) -> None:
    def second(function: Callable[..., Any]) -> list[Tensor]:
        sample = case.build(torch.float64).requiring_grad()
        outputs = [o for o in call(function, sample) if o.requires_grad]
        inputs = [sample.args[i] for i in sample.differentiable()]
        total = sum((o.square().sum() for o in outputs), torch.zeros((), dtype=torch.float64))
        first = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
        penalty = sum((g.square().sum() for g in first), torch.zeros((), dtype=torch.float64))
        return list(torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True))

    torch.testing.assert_close(second(case.function), second(case.reference), rtol=1e-7, atol=1e-7)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], list[Tensor]], Any]] = {
    "grad": lambda f, tensors: torch.func.grad(f, tuple(range(len(tensors))))(*tensors),
    "gradients of each example": lambda f, tensors: torch.vmap(torch.func.grad(f))(
        *(torch.stack([t, t]) for t in tensors)
    ),
    "jvp": lambda f, tensors: torch.func.jvp(f, tuple(tensors), tuple(t.cos() for t in tensors)),
    "hessian": lambda f, tensors: torch.func.hessian(f)(*tensors),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@primary
def test_transforms_of_functions_give_what_torch_gives(case: Case, transform: str) -> None:
    def transformed(function: Callable[..., Any]) -> Any:
        sample = case.build(torch.float64)
        positions = sample.differentiable()

        def total(*tensors: Tensor) -> Tensor:
            args = list(sample.args)
            for position, tensor in zip(positions, tensors, strict=True):
                args[position] = tensor
            return sum((o.square().sum() for o in call(function, Sample(tuple(args), sample.kwargs))), torch.zeros(()))

        return TRANSFORMS[transform](total, [sample.args[position] for position in positions])

    with sdpa_kernel(SDPBackend.MATH):  # the one of torch's attentions that goes forward
        torch.testing.assert_close(transformed(case.function), transformed(case.reference), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "arguments"), operator_samples(), ids=[name for name, _ in operator_samples()])
def test_operators_pass_opcheck(name: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    operator = getattr(torch.ops.dlkernels, name).default
    assert set(torch.library.opcheck(operator, arguments()).values()) == {"SUCCESS"}


def test_every_operator_is_sampled() -> None:
    registered = {
        name.removeprefix("dlkernels::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("dlkernels::")
    }
    assert registered == {name for name, _ in operator_samples()}


def test_every_operator_has_an_autograd_kernel() -> None:
    """Without one, gradients through it would silently be zero; opcheck does not notice."""
    for name, _ in operator_samples():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{name}", "Autograd"), name


@cases
def test_autocast_gives_the_type_that_torch_gives(case: Case) -> None:
    for source in (torch.float32, torch.bfloat16):
        sample = case.build(source)
        with torch.autocast("cpu", torch.bfloat16):
            actual = call(case.function, sample)
            with skipped_without_reference():
                expected = call(case.reference, sample)
        assert [a.dtype for a in actual] == [e.dtype for e in expected]


@primary
def test_inference_mode_and_deepcopied_arguments(case: Case) -> None:
    sample = case.build(torch.float32)
    expected = call(case.function, sample)
    with torch.inference_mode():
        assert_equal([o.clone() for o in call(case.function, copy.deepcopy(sample))], expected)
