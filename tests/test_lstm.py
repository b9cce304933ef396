"""What is particular to the LSTM: packing, layers and directions, projections, dropout, long sequences, the modules."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from dlkernels import functional as F
from dlkernels import nn
from dlkernels.ops.lstm import LSTMCellFunction, LSTMLayerFunction

from .cases import normal, random_like, skipped_without_reference
from .test_accuracy import error


def twins(*args: Any, dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[nn.LSTM, torch.nn.LSTM]:
    """The same LSTM twice: ours, and torch's with the same parameters."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(*args, dtype=dtype, **kwargs)
    ours = nn.LSTM(*args, dtype=dtype, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tensors_of(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def results(module: torch.nn.Module, input: Any, hx: Any = None) -> list[Tensor]:
    """Outputs, and gradients of the parameters for fixed incoming gradients."""
    outputs = tensors_of(tuple(module(input, hx)))
    grads = torch.autograd.grad(outputs, list(module.parameters()), random_like(outputs))
    return [*outputs, *grads]


# ---- layers, directions, projections, packing ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("projection", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both_ways"])
@pytest.mark.parametrize("layers", [1, 3])
def test_gradients_are_those_of_the_formula(layers: int, bidirectional: bool, projection: int, bias: bool) -> None:
    ours, _ = twins(3, 5, layers, bias=bias, bidirectional=bidirectional, proj_size=projection)
    runs = layers * (2 if bidirectional else 1)
    input = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(runs, 2, projection or 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(runs, 2, 5, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in ours.parameters()]

    def function(input: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> Any:
        return F.lstm(input, (h, c), parameters, bias, layers, 0.0, False, bidirectional, False)

    assert torch.autograd.gradcheck(function, (input, h, c, *parameters), fast_mode=True)


def test_second_gradients_of_a_packed_batch_are_traced() -> None:
    """A trace sees the shape of batch_sizes and not its values."""
    batch_sizes = torch.tensor([4, 4, 2, 1])
    shapes = ((11, 3), (1, 4, 5), (1, 4, 5), (20, 3), (20, 5))
    tensors = [normal(*s, seed=i, dtype=torch.float64) for i, s in enumerate(shapes)]

    def second(input: Tensor, batch_sizes: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (input, h, c, w_ih, w_hh)]
        outputs = F.lstm(leaves[0], batch_sizes, leaves[1:3], leaves[3:], False, 1, 0.0, False, False)
        first = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    arguments = (tensors[0], batch_sizes, *tensors[1:])
    graph = make_fx(second, tracing_mode="fake")(*arguments)
    torch.testing.assert_close(graph(*arguments), second(*arguments))
    other = (tensors[0], torch.tensor([4, 3, 3, 1]), *tensors[1:])
    torch.testing.assert_close(graph(*other), second(*other))


def test_second_gradients_of_the_cell() -> None:
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 4), (2, 4), (16, 3))]
    tensors += [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((16, 4), (16,), (16,))]
    assert torch.autograd.gradgradcheck(lambda x, h, c, *p: F.lstm_cell(x, (h, c), *p), tensors)


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("sorted_lengths", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("projection", [0, 2])
def test_packed_sequences_are_those_of_torch(projection: int, sorted_lengths: bool, batch_first: bool) -> None:
    options = {"bidirectional": True, "proj_size": projection, "batch_first": batch_first}
    ours, theirs = twins(3, 4, 2, **options)
    lengths = [5, 4, 4, 1] if sorted_lengths else [1, 4, 5, 4]
    padded = torch.randn(*((4, 5) if batch_first else (5, 4)), 3, dtype=torch.float64)
    packed = pack_padded_sequence(padded, torch.tensor(lengths), batch_first, enforce_sorted=sorted_lengths)
    states = (torch.randn(4, 4, projection or 4).double(), torch.randn(4, 4, 4).double())
    for hx in (None, states):
        torch.testing.assert_close(results(ours, packed, hx), results(theirs, packed, hx))
        output, _ = ours(packed, hx)
        assert isinstance(output, PackedSequence)
        assert torch.equal(output.batch_sizes, packed.batch_sizes)


def test_a_packed_batch_gives_what_each_sequence_gives_alone() -> None:
    ours, _ = twins(3, 6, 2, bidirectional=True)
    lengths = [2, 7, 3]
    padded = torch.randn(7, 3, 3, dtype=torch.float64)
    output, (h_n, c_n) = ours(pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False))
    unpacked, _ = pad_packed_sequence(output)
    for i, length in enumerate(lengths):
        alone, (h_alone, c_alone) = ours(padded[:length, i])
        torch.testing.assert_close(unpacked[:length, i], alone)
        assert not unpacked[length:, i].any()
        torch.testing.assert_close((h_n[:, i], c_n[:, i]), (h_alone, c_alone))


def test_packing_full_sequences_changes_nothing() -> None:
    ours, _ = twins(3, 6, bidirectional=True)
    padded = torch.randn(4, 5, 3, dtype=torch.float64)
    packed = pack_padded_sequence(padded, torch.full((5,), 4))
    for a, b in zip(results(ours, packed), results(ours, padded), strict=True):
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=0, atol=0)


def test_a_sequence_of_cells_is_the_layer() -> None:
    ours, _ = twins(5, 7)
    input = torch.randn(6, 3, 5, dtype=torch.float64)
    state = (torch.zeros(3, 7, dtype=torch.float64),) * 2
    outputs = []
    for step in input:
        state = F.lstm_cell(step, state, *ours.parameters())
        outputs.append(state[0])
    output, (h_n, c_n) = ours(input)
    torch.testing.assert_close((output, h_n[0], c_n[0]), (torch.stack(outputs), *state))


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.0), (torch.bfloat16, 1.2)], ids=str)
def test_long_sequences_stay_as_accurate_as_torch(dtype: torch.dtype, factor: float) -> None:
    """200 steps: what is lost in a step comes back in every later one."""
    torch.manual_seed(0)
    samples = torch.randn(200, 4, 16)
    parameters = [p.detach() for p in torch.nn.LSTM(16, 48).parameters()]
    values = [t.to(dtype) for t in (samples, torch.zeros(1, 4, 48), torch.zeros(1, 4, 48), *parameters)]
    outcomes = []
    for function, kind in ((F.lstm, dtype), (torch._VF.lstm, dtype), (torch._VF.lstm, torch.float64)):
        x, h, c, *p = (v.to(kind).requires_grad_() for v in values)
        outputs = list(function(x, (h, c), p, True, 1, 0.0, True, False, False))
        grads = torch.autograd.grad(outputs, [x, h, c, *p], random_like(outputs))
        outcomes.append((outputs, list(grads)))
    ours, theirs, exact = outcomes
    for part in range(2):
        assert error(ours[part], exact[part]) <= factor * error(theirs[part], exact[part])


def test_saturated_gates_are_exact() -> None:
    """Pre-activations far out: sigmoid and tanh at their limits, gradients zero rather than NaN."""
    input = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.ones(4, 1, requires_grad=True)
    h, c = F.lstm_cell(input, (torch.zeros(2, 1), torch.ones(2, 1)), weight, torch.zeros(4, 1))
    assert c.tolist() == [[2.0], [0.0]]
    grads = torch.autograd.grad(h.sum() + c.sum(), [input, weight])
    assert not any(g.any() for g in grads)


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_dropout_draws_what_torch_draws() -> None:
    ours, theirs = twins(3, 8, 3, dropout=0.4)
    input = torch.randn(5, 4, 3, dtype=torch.float64)
    outcomes = []
    for module in (ours, theirs, ours):
        torch.manual_seed(5)
        outcomes.append(results(module, input))
    torch.testing.assert_close(outcomes[0], outcomes[1])
    torch.testing.assert_close(outcomes[0], outcomes[2], rtol=0, atol=0)
    torch.manual_seed(6)
    assert not torch.equal(results(ours, input)[0], outcomes[0][0])


def test_dropout_is_off_in_evaluation() -> None:
    ours, theirs = twins(3, 8, 2, dropout=0.9)
    input = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(results(ours.eval(), input), results(theirs.eval(), input))


# ---- bad input -----------------------------------------------------------------------------------------------------


def cell_arguments(**changes: Any) -> tuple[Any, ...]:
    arguments = {
        "input": torch.zeros(2, 3),
        "h": torch.zeros(2, 4),
        "c": torch.zeros(2, 4),
        "w_ih": torch.zeros(16, 3),
        "w_hh": torch.zeros(16, 4),
        "b_ih": torch.zeros(16),
        "b_hh": torch.zeros(16),
    } | changes
    input, h, c, *parameters = arguments.values()
    return (input, (h, c), *parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.zeros(2, 5)}, "input has inconsistent input_size: got 5 expected 3"),
        ({"input": torch.zeros(3)}, "input must have shape"),
        ({"input": torch.zeros(2, 3).double()}, "expected scalar type Double but found Float"),
        ({"input": torch.zeros(2, 3).long()}, "input is Long"),
        ({"h": torch.zeros(2, 5)}, "hidden0 has inconsistent hidden_size: got 5, expected 4"),
        ({"c": torch.zeros(2, 5)}, "hidden1 has inconsistent hidden_size: got 5, expected 4"),
        ({"h": torch.zeros(3, 4)}, "Input batch size 2 doesn't match hidden0 batch size 3"),
        ({"c": torch.zeros(2, 4).double()}, "hidden1 must have the type of input"),
        ({"w_ih": torch.zeros(15, 3)}, "w_ih has shape"),
        ({"w_hh": torch.zeros(16, 5)}, "w_hh has shape"),
        ({"b_ih": torch.zeros(4)}, "b_ih has shape"),
    ],
)
def test_bad_arguments_of_the_cell_are_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=re.escape(message)):
        F.lstm_cell(*cell_arguments(**changes))


def stack(
    input: tuple[int, ...] = (2, 3, 4),
    h: tuple[int, ...] = (1, 3, 5),
    c: tuple[int, ...] = (1, 3, 5),
    batch_sizes: list[int] | None = None,
    parameters: slice = slice(None),
) -> Any:
    p = list(torch.nn.LSTM(4, 5).parameters())[parameters]
    states = (torch.zeros(h), torch.zeros(c))
    if batch_sizes is not None:
        return F.lstm(
            torch.zeros(input), torch.tensor(batch_sizes, dtype=torch.int64), states, p, True, 1, 0.0, False, False
        )
    return F.lstm(torch.zeros(input), states, p, True, 1, 0.0, False, False, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": (0, 3, 4)}, "Expected sequence length to be larger than 0 in RNN"),
        ({"input": (3, 4)}, "input must have 3 dimensions, got 2"),
        ({"input": (2, 3, 7)}, "input.size(-1) must be equal to input_size. Expected 4, got 7"),
        ({"h": (1, 2, 5)}, "hidden[0] of a layer has shape"),
        ({"c": (1, 3, 4)}, "hidden[1] of a layer has shape"),
        ({"h": (2, 3, 5)}, "Expected hidden[0] size"),
        ({"parameters": slice(0, 3)}, "incorrect number of RNN parameters"),
        ({"input": (4, 4), "batch_sizes": [3, 2]}, "batch_sizes add up to 5, but input has 4 rows"),
        ({"input": (5, 4), "batch_sizes": [2, 3]}, "never grow"),
        ({"input": (3, 4), "batch_sizes": [3, 0]}, "must be positive"),
        ({"input": (4, 4), "batch_sizes": [2, 2]}, "batch_sizes begins with 2"),
        ({"input": (0, 4), "batch_sizes": []}, "Expected sequence length to be larger than 0 in RNN"),
    ],
)
def test_bad_arguments_of_a_sequence_are_named(arguments: dict[str, Any], message: str) -> None:
    stack()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        stack(**arguments)


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients() -> None:
    ours, _ = twins(3, 4, 2, bidirectional=True)
    output, (h_n, c_n) = ours(torch.zeros(5, 0, 3, dtype=torch.float64))
    assert (output.shape, h_n.shape, c_n.shape) == ((5, 0, 8), (4, 0, 4), (4, 0, 4))
    output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


# ---- modules -------------------------------------------------------------------------------------------------------


def test_a_module_moves_between_types_without_warnings() -> None:
    module = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            output, (h_n, _) = copy.deepcopy(module).to(dtype)(torch.randn(5, 3, 3, dtype=dtype))
            assert output.dtype == h_n.dtype == dtype


def test_module_checks_are_those_of_torch() -> None:
    module = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="LSTM: Expected input to be 2D or 3D, got 1D instead"):
        module(torch.zeros(3))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        module(torch.zeros(2, 5, 3).double())
    with pytest.raises(RuntimeError, match="For batched 3-D input, hx and cx should also be 3-D"):
        module(torch.zeros(2, 5, 3), (torch.zeros(1, 4), torch.zeros(1, 4)))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 5, 4\), got \[1, 5, 3\]"):
        module(torch.zeros(2, 5, 3), (torch.zeros(1, 5, 4), torch.zeros(1, 5, 3)))


def test_autocast_runs_in_the_lower_precision() -> None:
    module = nn.LSTM(3, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output, states = module(torch.randn(5, 2, 3))
    assert {output.dtype, *(s.dtype for s in states)} == {torch.bfloat16}
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("projection", [0, 2])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_states_of_the_types_that_torch_gives(
    state_dtype: torch.dtype | None, projection: int, packed: bool
) -> None:
    ours, theirs = twins(3, 4, 2, proj_size=projection, dtype=torch.float32)
    input: Any = torch.randn(5, 2, 3)
    if packed:
        input = pack_padded_sequence(input, torch.tensor([5, 3]))
    states = None
    if state_dtype is not None:
        states = (torch.randn(2, 2, projection or 4).to(state_dtype), torch.randn(2, 2, 4).to(state_dtype))
    with torch.autocast("cpu", torch.bfloat16):
        actual = tensors_of(tuple(ours(input, states)))
        with skipped_without_reference():
            expected = tensors_of(tuple(theirs(input, states)))
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
    sum(t.float().sum() for t in actual).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_a_cell_under_autocast_keeps_a_float32_state() -> None:
    module, state = nn.LSTMCell(3, 4), (torch.zeros(2, 4), torch.zeros(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in module(torch.randn(2, 3), state)] == [torch.float32] * 2
        half = tuple(s.bfloat16() for s in state)
        assert [t.dtype for t in module(torch.randn(2, 3), half)] == [torch.bfloat16] * 2


@torch._dynamo.config.patch(allow_rnn=True)  # without it, Dynamo enters no subclass of nn.LSTM
def test_the_module_compiles_whole() -> None:
    torch._dynamo.reset()
    module, _ = twins(3, 5, 2, bidirectional=True, dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (3, 6):
        input = torch.randn(steps, 4, 3)
        torch.testing.assert_close(results(compiled, input), results(module, input), rtol=0, atol=0)


def test_a_model_compiles_around_the_module() -> None:
    torch._dynamo.reset()
    module, _ = twins(3, 5, dtype=torch.float32)
    compiled = torch.compile(lambda x: module(2 * x)[0] + 1, backend="aot_eager")
    input = torch.randn(4, 2, 3)
    torch.testing.assert_close(compiled(input), module(2 * input)[0] + 1, rtol=0, atol=0)


def test_the_cell_compiles_whole() -> None:
    torch._dynamo.reset()
    module = nn.LSTMCell(3, 5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5):
        input = torch.randn(batch, 3)
        torch.testing.assert_close(results(compiled, input), results(module, input), rtol=0, atol=0)


# ---- the readable Functions, and any shape --------------------------------------------------------------------------


def test_the_functions_give_what_the_modules_give() -> None:
    ours, _ = twins(3, 4)
    parameters = list(ours.parameters())
    input = torch.randn(5, 2, 3, dtype=torch.float64)
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    outputs = LSTMLayerFunction.apply(input, zeros, zeros, *parameters, None, None, False)
    assert [o.requires_grad for o in outputs] == [True, True, True, False, False]
    grads = torch.autograd.grad(list(outputs[:3]), parameters, random_like(outputs[:3]))
    expected = F.lstm(input, (zeros[None], zeros[None]), parameters, True, 1, 0.0, False, False, False)
    expected_grads = torch.autograd.grad(
        expected, parameters, [g.view(e.shape) for g, e in zip(random_like(outputs[:3]), expected, strict=True)]
    )
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)

    outputs = LSTMCellFunction.apply(input[0], zeros, zeros, *parameters)
    grads = torch.autograd.grad(list(outputs[:2]), parameters, random_like(outputs[:2]))
    expected = F.lstm_cell(input[0], (zeros, zeros), *parameters)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, parameters, random_like(expected)), rtol=0, atol=0)


@given(st.data())
def test_any_shape_gives_what_torch_gives(data: st.DataObject) -> None:
    hidden = data.draw(st.integers(1, 40), "hidden")
    projection = data.draw(st.integers(0, hidden - 1), "projection")
    options = {
        "num_layers": data.draw(st.integers(1, 2), "layers"),
        "bias": data.draw(st.booleans(), "bias"),
        "bidirectional": data.draw(st.booleans(), "bidirectional"),
        "proj_size": projection,
    }
    inputs = data.draw(st.integers(1, 40), "inputs")
    lengths = sorted(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=30), "lengths"), reverse=True)
    ours, theirs = twins(inputs, hidden, **options)
    input: Any = torch.randn(lengths[0], len(lengths), inputs, dtype=torch.float64)
    if data.draw(st.booleans(), "packed"):
        input = pack_padded_sequence(input, torch.tensor(lengths))
    torch.testing.assert_close(results(ours, input), results(theirs, input))


def test_results_do_not_depend_on_the_instruction_set_beyond_rounding(isa: str) -> None:
    for inputs, hidden, batch in itertools.product((1, 17), (1, 15, 33), (1, 7, 49)):
        ours, theirs = twins(inputs, hidden, proj_size=hidden // 2)
        input = torch.randn(2, batch, inputs, dtype=torch.float64)
        torch.testing.assert_close(results(ours, input), results(theirs, input))


def test_gradients_reach_states_and_input_of_a_single_cell() -> None:
    sample_arguments = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 4), (2, 4))]
    parameters = [torch.randn(s, dtype=torch.float64) for s in ((16, 3), (16, 4))]
    outcomes = []
    for function in (F.lstm_cell, torch._VF.lstm_cell):
        x, h, c = sample_arguments
        outputs = list(function(x, (h, c), *parameters))
        outcomes.append(torch.autograd.grad(outputs, sample_arguments, random_like(outputs)))
    torch.testing.assert_close(*outcomes)
