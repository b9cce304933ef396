"""Every public function has a rule for torch.vmap: over any argument, nested, and with gradients of each example."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import functional, nn

from ..cases import Case, all_cases, outputs_of, primary_cases
from ..cases.lstm import CASES as LSTMS

DTYPES = (torch.float32, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
primary = pytest.mark.parametrize("case", primary_cases(), ids=str)

# torch's batch norm moves running statistics in place, for which its rule wants them to be of every example.
VMAPPED = [case for case in (*primary_cases(), *LSTMS) if "running" not in case.name]
BOUNDS = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


def function_of(case: Case, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """The case as a function of its differentiable tensors, and these."""
    sample = case.build(dtype)
    positions = sample.differentiable()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        args = list(sample.args)
        for position, tensor in zip(positions, tensors, strict=True):
            args[position] = tensor
        return tuple(outputs_of(case.function(*args, **sample.kwargs)))

    return function, [sample.args[position] for position in positions]


def variants(tensor: Tensor, count: int, dimension: int = 0) -> Tensor:
    return torch.stack([tensor * (1 + 0.25 * i) for i in range(count)], dimension)


def test_every_public_function_has_a_case() -> None:
    columns = {case.column for case in primary_cases()}
    named = {"scaled_dot_product_attention": "attention", "lstm_cell": "lstm"}
    assert {named.get(name, name) for name in functional.__all__} == columns
    assert {"cell_small", "one_layer"} <= {case.name for case in LSTMS}


@dtypes
@pytest.mark.parametrize("case", VMAPPED, ids=str)
def test_over_one_argument_equals_a_loop(case: Case, dtype: torch.dtype) -> None:
    """The input (examples), and each of the weights (an ensemble of models)."""
    function, tensors = function_of(case, dtype)
    for position in {0, 1, len(tensors) - 1} & set(range(len(tensors))):
        several = variants(tensors[position], 3, dimension=-1)
        dims: list[int | None] = [None] * len(tensors)
        dims[position] = -1
        arguments = [*tensors[:position], several, *tensors[position + 1 :]]
        found = torch.vmap(function, tuple(dims), out_dims=-1, randomness="same")(*arguments)
        each = [function(*tensors[:position], v, *tensors[position + 1 :]) for v in several.unbind(-1)]
        expected = tuple(torch.stack(outputs, -1) for outputs in zip(*each, strict=True))
        torch.testing.assert_close(found, expected, **BOUNDS[dtype])


@dtypes
@primary
def test_nested_over_inputs_and_weights_equals_loops(case: Case, dtype: torch.dtype) -> None:
    function, (first, *rest) = function_of(case, dtype)
    if not rest:  # nothing but an input
        rest, two = [first], function
        function = lambda x, other: two(x + other)  # noqa: E731
    inputs, weights = variants(first, 2), [variants(tensor, 3) for tensor in rest]
    inner = torch.vmap(function, (None, *[0] * len(rest)))
    found = torch.vmap(inner, (0, *[None] * len(rest)))(inputs, *weights)
    each = [[function(x, *w) for w in zip(*weights, strict=True)] for x in inputs]
    expected = tuple(
        torch.stack([torch.stack([cell[output] for cell in row]) for row in each]) for output in range(len(found))
    )
    torch.testing.assert_close(found, expected, **BOUNDS[dtype])


@dtypes
@pytest.mark.parametrize("case", VMAPPED, ids=str)
def test_gradients_of_each_example_are_those_of_calls_of_their_own(case: Case, dtype: torch.dtype) -> None:
    function, tensors = function_of(case, dtype)

    def total(*values: Tensor) -> Tensor:
        return sum((output.square().sum() for output in function(*values)), torch.zeros((), dtype=dtype))

    examples = variants(tensors[0], 2)
    last = len(tensors) - 1
    wanted = tuple(sorted({0, last}))
    found = torch.vmap(torch.func.grad(total, wanted), (0, *[None] * last))(examples, *tensors[1:])
    for i, example in enumerate(examples):
        leaves = [t.detach().clone().requires_grad_() for t in (example, *tensors[1:])]
        expected = torch.autograd.grad(total(*leaves), [leaves[position] for position in wanted])
        torch.testing.assert_close([gradient[i] for gradient in found], list(expected), **BOUNDS[dtype])


@pytest.mark.parametrize("case", [case for case in LSTMS if case.primary or "packed" in case.name], ids=str)
def test_lstms_go_forward_with_derivatives(case: Case) -> None:
    """In float32 too, where torch's own have no such rule."""
    function, tensors = function_of(case, torch.float32)
    tangents = [tensor.cos() for tensor in tensors]
    found, derivative = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    step = 1e-6
    wide = [tensor.double() for tensor in tensors]
    ahead, behind = (function(*(t + s * d for t, d in zip(wide, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(found, function(*tensors), rtol=1e-4, atol=1e-5)
    for forward, a, b in zip(derivative, ahead, behind, strict=True):
        torch.testing.assert_close(forward.double(), (a - b) / (2 * step), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_an_ensemble_of_lstm_modules(packed: bool) -> None:
    models = [nn.LSTM(3, 4, num_layers=2, bidirectional=True) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(list(models))
    base = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    steps = torch.randn(5, 2, 3)
    data = torch.nn.utils.rnn.pack_padded_sequence(steps, torch.tensor([5, 3])) if packed else steps

    def output(state: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        result, _ = torch.func.functional_call(base, (state, rest), (data,))
        return result.data if packed else result

    found = torch.vmap(output)(parameters, buffers)
    expected = torch.stack([m(data)[0].data if packed else m(data)[0] for m in models])
    torch.testing.assert_close(found, expected)


def test_dropout_between_layers_follows_the_randomness_that_was_asked_for() -> None:
    lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    steps = torch.randn(1, 5, 2, 3).expand(4, -1, -1, -1)
    same = torch.vmap(lambda x: lstm(x)[0], randomness="same")(steps)
    different = torch.vmap(lambda x: lstm(x)[0], randomness="different")(steps)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_no_case_takes_vmaps_slow_fallback(recwarn: pytest.WarningsRecorder) -> None:
    for case in primary_cases():
        function, tensors = function_of(case, torch.float64)
        torch.vmap(function)(*(variants(tensor, 2) for tensor in tensors))
    assert not [warning for warning in recwarn if "performance drop" in str(warning.message)]


def test_signatures_are_covered() -> None:
    """A public function that is added is to be added to the cases."""
    assert all(inspect.isfunction(getattr(functional, name)) for name in functional.__all__)
    assert {case.column for case in all_cases()} == {case.column for case in primary_cases()}
