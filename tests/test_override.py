"""Any PyTorch code on the kernels: what ``override`` takes, what it leaves, and what stays as it was around it."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dlkernels
from dlkernels import functional
from dlkernels.operations import OPERATIONS

from .cases import (
    COLUMNS,
    Case,
    all_cases,
    call,
    gradients,
    outputs_of,
    primary_cases,
    skipped_without_reference,
)

CASES = [case for case in all_cases() if case.column != "linear_cross_entropy"]  # whose references are two operations
cases = pytest.mark.parametrize("case", CASES, ids=str)
primary = pytest.mark.parametrize("case", [c for c in primary_cases() if c in CASES], ids=str)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def with_gradients(function: Callable[..., Any], *arguments: Any) -> list[Tensor]:
    """Outputs and gradients of all arguments, each time from the same random state."""
    torch.manual_seed(1)
    outputs = outputs_of(function(*arguments))
    leaves = [leaf for leaf in outputs_of(arguments) if leaf.requires_grad]
    if not leaves:
        return outputs
    total = sum((o.square().sum() for o in outputs if o.requires_grad), torch.zeros((), dtype=torch.float64))
    return outputs + list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def assert_overridden(calls: dict[str, int], function: Callable[..., Any], *arguments: Any) -> None:
    """The same results and gradients as torch's, from these calls here and none in torch."""
    expected = with_gradients(function, *arguments)
    with dlkernels.override() as log:
        actual = with_gradients(function, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert (log.calls, log.fallbacks) == (calls, [])


# ---- what it takes ---------------------------------------------------------------------------------------------------

STATE = (normal(1, 2, 4), normal(1, 2, 4))
WEIGHTS = [normal(16, 3), normal(16, 4), normal(16), normal(16)]
LABELS = torch.tensor([1, 0, 3, 2, 1])
ONE, ZERO = (1, 1), (0, 0)

SPELLINGS: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {
    "F.conv2d": ("conv2d", F.conv2d, (normal(2, 3, 6, 5), normal(4, 3, 3, 3), normal(4))),
    "torch.conv2d": ("conv2d", torch.conv2d, (normal(3, 6, 5), normal(4, 3, 3, 3), None, 2, "valid")),
    "F.batch_norm": ("batch_norm", lambda x: F.batch_norm(x, None, None, training=True), (normal(6, 3),)),
    "torch.batch_norm": (
        "batch_norm",
        lambda x, w, b: torch.batch_norm(x, w, b, torch.zeros(3).double(), torch.ones(3).double(), False, 0, 0.1, True),
        (normal(6, 3), normal(3), normal(3)),
    ),
    "torch.lstm": (
        "lstm",
        lambda x, state, weights: torch.lstm(x, state, weights, True, 1, 0.0, True, False, False),
        (normal(5, 2, 3), STATE, WEIGHTS),
    ),
    "torch.lstm of a packed sequence": (
        "lstm",
        lambda x, state, weights: torch.lstm(x, torch.tensor([2, 1]), state, weights, True, 1, 0.0, True, False),
        (normal(3, 3), STATE, WEIGHTS),
    ),
    "torch.lstm_cell": ("lstm", torch.lstm_cell, (normal(2, 3), (STATE[0][0], STATE[1][0]), *WEIGHTS)),
    "torch._VF.lstm_cell": ("lstm", torch._VF.lstm_cell, (normal(2, 3), (STATE[0][0], STATE[1][0]), *WEIGHTS[:2])),
    "F.linear": ("linear", F.linear, (normal(2, 5, 3), normal(4, 3), normal(4))),
    "F.linear without rows": ("linear", F.linear, (normal(3), normal(4, 3))),
    "torch._C._nn.linear": ("linear", torch._C._nn.linear, (normal(5, 3), normal(4, 3), normal(4))),
    "torch.matmul": ("linear", torch.matmul, (normal(2, 5, 3), normal(3, 4))),
    "torch.mm": ("linear", torch.mm, (normal(5, 3), normal(3, 4))),
    "torch.addmm": ("linear", torch.addmm, (normal(4), normal(5, 3), normal(3, 4))),
    "@": ("linear", lambda x, w: x @ w.T, (normal(5, 3), normal(4, 3))),
    "Tensor.matmul": ("linear", lambda x, w: x.matmul(w), (normal(2, 5, 3), normal(3, 4))),
    "Tensor.mm": ("linear", lambda x, w: x.mm(w.t()), (normal(5, 3), normal(4, 3))),
    "Tensor.addmm": ("linear", lambda b, x, w: b.addmm(x, w), (normal(4), normal(5, 3), normal(3, 4))),
    "F.cross_entropy": ("cross_entropy", lambda x: F.cross_entropy(x, LABELS, ignore_index=3), (normal(5, 4),)),
    "torch._C._nn.cross_entropy_loss": (
        "cross_entropy",
        lambda x: torch._C._nn.cross_entropy_loss(x, LABELS, None, 2, 3, 0.1),
        (normal(5, 4),),
    ),
    "F.scaled_dot_product_attention": (
        "attention",
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.3),
        (normal(2, 2, 5, 4), normal(2, 2, 6, 4)),
    ),
    "keywords": (
        "conv2d",
        lambda x, w: F.conv2d(weight=w, input=x, stride=(2, 1), padding=1),
        (normal(2, 3, 6, 5), normal(4, 3, 3, 3)),
    ),
}
if hasattr(F, "linear_cross_entropy"):
    SPELLINGS["F.linear_cross_entropy"] = (
        "linear_cross_entropy",
        lambda x, w: F.linear_cross_entropy(x, w, LABELS, label_smoothing=0.1),
        (normal(5, 3), normal(4, 3)),
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_operation_runs_here(spelling: str) -> None:
    operation, function, arguments = SPELLINGS[spelling]
    assert_overridden({operation: 1}, function, *arguments)


@pytest.mark.parametrize(
    ("build", "shape", "calls"),
    [
        (lambda: torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 6), {"conv2d": 1}),
        (lambda: torch.nn.BatchNorm2d(3, momentum=None), (2, 3, 5, 6), {"batch_norm": 1}),
        (lambda: torch.nn.SyncBatchNorm(3).eval(), (2, 3, 5, 6), {"batch_norm": 1}),
        (lambda: torch.nn.Linear(6, 4), (2, 3, 5, 6), {"linear": 1}),
        (lambda: torch.nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True, proj_size=2), (2, 5, 3), {"lstm": 1}),
        (lambda: torch.nn.LSTM(3, 4, bias=False), (5, 3), {"lstm": 1}),
        (lambda: torch.nn.LSTMCell(3, 4), (2, 3), {"lstm": 1}),
        (lambda: torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0), (5, 2, 8), {"linear": 4, "attention": 1}),
        (lambda: torch.nn.TransformerDecoderLayer(8, 2, 16, 0.0), (5, 2, 8), {"linear": 7, "attention": 2}),
    ],
)
def test_modules_run_here(build: Callable[[], torch.nn.Module], shape: tuple[int, ...], calls: dict[str, int]) -> None:
    module = build().double()
    decoder = isinstance(module, torch.nn.TransformerDecoderLayer)
    assert_overridden(calls, lambda x: module(x, x) if decoder else module(x), normal(*shape))


def test_a_packed_sequence_runs_here() -> None:
    lstm = torch.nn.LSTM(3, 4).double()
    lengths = torch.tensor([2, 5, 3])

    def packed(x: Tensor) -> Any:
        return lstm(torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data

    assert_overridden({"lstm": 1}, packed, normal(5, 3, 3))


@pytest.mark.parametrize("norm_first", [False, True])
def test_fused_inference_paths_give_way_to_the_ordinary_calls(norm_first: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = normal(3, 5, 8).detach()
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        assert_overridden({"linear": 8, "attention": 2}, lambda x: encoder(x, src_key_padding_mask=padding), x)
        assert_overridden({"linear": 2, "attention": 1}, lambda x: attention(x, x, x, need_weights=False)[0], x)


def test_attention_weights_are_torchs_and_counted_so() -> None:
    attention = torch.nn.MultiheadAttention(8, 2).double()
    x = normal(5, 2, 8)
    expected = with_gradients(lambda x: attention(x, x, x), x)
    with dlkernels.override() as log:
        actual = with_gradients(lambda x: attention(x, x, x), x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert log.calls == {"linear": 2}
    assert [(f.operation, f.count) for f in log.fallbacks] == [("attention", 1)]


@cases
def test_a_program_gets_what_our_functions_give(case: Case) -> None:
    expected_sample, sample = case.build(torch.float32).requiring_grad(), case.build(torch.float32).requiring_grad()
    torch.manual_seed(0)
    expected = call(case.function, expected_sample)
    torch.manual_seed(0)
    with dlkernels.override() as log:
        actual = call(case.reference, sample)
        actual_gradients = gradients(actual, sample)
    assert set(log.calls) == {case.column} and log.fallbacks == []
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(actual_gradients, gradients(expected, expected_sample), rtol=0, atol=0)


@cases
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_autocast_gives_the_types_that_torch_gives(case: Case, source: torch.dtype) -> None:
    sample = case.build(source).requiring_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with skipped_without_reference():
            expected = call(case.reference, sample)
        with dlkernels.override() as log:
            actual = call(case.reference, sample)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert log.fallbacks == []
    types = [[g.dtype for g in gradients(outputs, sample)] for outputs in (actual, expected)]
    assert types[0] == types[1]


def test_every_operation_has_its_place_in_override_and_convert() -> None:
    assert set(OPERATIONS) == set(COLUMNS)
    spelled = {operation for operation, _, _ in SPELLINGS.values()}
    assert spelled | {"linear_cross_entropy"} == set(OPERATIONS)


def test_before_torch_2_13_multi_head_attention_is_torchs_and_counted_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["dlkernels.override"], "_redispatch", None)
    attention = torch.nn.MultiheadAttention(8, 2).double()
    x = normal(5, 2, 8)
    with dlkernels.override() as log:
        actual = with_gradients(lambda x: attention(x, x, x, need_weights=False)[0], x)
    expected = with_gradients(lambda x: attention(x, x, x, need_weights=False)[0], x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert log.calls == {} and [f.operation for f in log.fallbacks] == ["attention"]


# ---- what it leaves --------------------------------------------------------------------------------------------------


def test_ops_and_skip_choose() -> None:
    x, w = normal(5, 3), normal(4, 3)

    def program() -> Tensor:
        return F.cross_entropy(F.linear(x, w), LABELS)

    with dlkernels.override(ops=["cross_entropy", "conv2d"]) as log:
        program()
    assert (log.calls, log.fallbacks) == ({"cross_entropy": 1}, [])
    with dlkernels.override(skip=("cross_entropy",)) as log:
        program()
    assert (log.calls, log.fallbacks) == ({"linear": 1}, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["conv2d", "conv3d"]}, "ops names 'conv3d', expected some of conv2d, batch_norm, lstm"),
        ({"skip": ["softmax"]}, "skip names 'softmax', expected"),
        ({"ops": "conv2d"}, "ops must be a sequence of names, got the string 'conv2d'"),
    ],
)
def test_unknown_operations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dlkernels.override(**arguments)


class Doubled(Tensor):
    """A tensor with a mind of its own: products come out twice as large."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.linear else result


def nested_rows() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])


LEFT: dict[str, tuple[str, Callable[[], Any]]] = {
    "integers": ("type torch.int64", lambda: F.linear(torch.arange(6).view(2, 3), torch.arange(12).view(4, 3))),
    "complex numbers": (
        "type torch.complex64",
        lambda: F.conv2d(torch.ones(1, 2, 4, 4).cfloat(), torch.ones(3, 2, 3, 3).cfloat()),
    ),
    "nested tensors": (
        "arguments from the .NestedTensorCPU. backend",
        lambda: F.linear(nested_rows(), torch.ones(4, 3)).unbind(),
    ),
    "sparse tensors": (
        "input is a torch.sparse_coo tensor of torch.float32 on cpu, expected a torch.strided one",
        lambda: torch.mm(torch.eye(3).to_sparse(), torch.ones(3, 2)),
    ),
    "tensors of another type": (
        "tensors of type Doubled",
        lambda: F.linear(torch.ones(2, 3).as_subclass(Doubled), torch.ones(4, 3)).as_subclass(Tensor),
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_cannot_run_here_runs_in_torch_and_is_counted(kind: str) -> None:
    reason, program = LEFT[kind]
    torch.manual_seed(0)
    expected = program()
    torch.manual_seed(0)
    with dlkernels.override() as log:
        actual = program()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert log.calls == {}
    [fallback] = log.fallbacks
    assert fallback.count == 1 and re.search(reason, fallback.reason)


@pytest.mark.parametrize(
    "program",
    [
        lambda: torch.matmul(torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
        lambda: torch.ones(3) @ torch.ones(3, 2),
        lambda: torch.addmm(torch.ones(2, 3), torch.ones(2, 4), torch.ones(4, 3)),
        lambda: torch.addmm(torch.ones(3), torch.ones(2, 4), torch.ones(4, 3), beta=2),
        lambda: torch.mm(torch.ones(2, 4), torch.ones(4, 3), out=torch.empty(2, 3)),
        lambda: torch.addmm(input=torch.ones(3), mat1=torch.ones(2, 4), mat2=torch.ones(4, 3)),
        lambda: F.nll_loss(F.log_softmax(torch.ones(2, 3), 1), torch.tensor([0, 1])),
        lambda: F.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3)),
    ],
    ids=["batches", "vector", "residual", "scaled", "out", "keywords", "nll_loss", "conv1d"],
)
def test_what_is_none_of_the_operations_passes_unnoticed(program: Callable[[], Tensor]) -> None:
    with dlkernels.override() as log:
        actual = program()
    torch.testing.assert_close(actual, program(), rtol=0, atol=0)
    assert (log.calls, log.fallbacks) == ({}, [])


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: F.conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 3, 3, 3)),
        lambda: F.linear(torch.ones(2, 3), torch.ones(4, 5)),
        lambda: F.cross_entropy(torch.ones(2, 3), torch.tensor([0, 5])),
        lambda: F.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), reduction="most"),
        lambda: F.batch_norm(torch.ones(1, 3), None, None, training=True),
        lambda: F.scaled_dot_product_attention(*[torch.ones(2, 3, 4)] * 3, torch.ones(3, 3), is_causal=True),
        lambda: F.conv2d(torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3), strides=2),
    ],
)
def test_a_mistake_is_the_error_that_torch_makes_of_it(mistake: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as expected:
        mistake()
    with dlkernels.override() as log, pytest.raises(type(expected.value)) as actual:
        mistake()
    assert str(actual.value) == str(expected.value)
    assert (log.calls, log.fallbacks) == ({}, [])


def test_printing_the_log_gives_a_table() -> None:
    with dlkernels.override() as log:
        assert str(log) == "no calls"
        for _ in range(11):
            F.linear(torch.ones(2, 3), torch.ones(4, 3))
        F.conv2d(torch.ones(1, 2, 4, 4, dtype=torch.int64), torch.ones(3, 2, 3, 3, dtype=torch.int64))
    assert str(log).splitlines() == [
        "operation  calls  where",
        "conv2d         1  torch: type torch.int64",
        "linear        11  here",
    ]


# ---- where it reaches ------------------------------------------------------------------------------------------------


def linear() -> Tensor:
    return F.linear(torch.ones(2, 3), torch.ones(4, 3))


def test_it_decorates_functions_and_ends_with_an_error() -> None:
    on_ours = dlkernels.override()

    @on_ours
    def fails() -> None:
        linear()
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
    linear()
    assert on_ours.calls == {"linear": 2}


def test_entered_again_it_counts_once() -> None:
    log = dlkernels.override()
    with log:
        linear()
        with log:
            linear()
            torch.arange(6).view(2, 3) @ torch.arange(3).view(3, 1)
        linear()
    assert log.calls == {"linear": 3}
    assert [f.count for f in log.fallbacks] == [1]


def test_the_innermost_decides() -> None:
    with dlkernels.override() as outer:
        with dlkernels.override(skip=["linear"]) as inner:
            linear()
            torch.nn.LSTMCell(3, 4)(torch.ones(2, 3))
        linear()
    assert (outer.calls, inner.calls) == ({"linear": 1}, {"lstm": 1})


def test_other_threads_are_not_touched() -> None:
    ready, done = threading.Event(), threading.Event()

    def other() -> None:
        ready.wait()
        linear()
        with dlkernels.override() as log:
            linear()
        results.append(log.calls)
        done.set()

    results: list[Any] = []
    thread = threading.Thread(target=other)
    thread.start()
    with dlkernels.override() as log:
        ready.set()
        done.wait()
        linear()
    thread.join()
    assert [log.calls, *results] == [{"linear": 1}, {"linear": 1}]


def test_one_log_counts_every_call_of_many_threads() -> None:
    log = dlkernels.override()

    def work() -> None:
        with log:
            for _ in range(200):
                linear()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.calls == {"linear": 800}


class Record(TorchFunctionMode):
    """Notes what torch is asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_other_modes_see_what_goes_on_to_torch() -> None:
    with Record() as record, torch.device("cpu"), dlkernels.override(skip=["linear"]), dlkernels.override() as log:
        torch.zeros(3)
        torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64)
        linear()
    assert log.calls == {"linear": 1} and len(log.fallbacks) == 1
    assert {"zeros", "matmul"} <= set(record.names) and "linear" not in record.names


# ---- what is around it -----------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> torch.nn.Module:
    """Each operation that a network has inside, with dropout in the attention."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.norm = torch.nn.BatchNorm2d(4)
            self.rows = torch.nn.LSTM(4, 8, batch_first=True)
            self.attention = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
            self.head = torch.nn.Linear(8, 5)

        def forward(self, images: Tensor) -> Tensor:
            x = torch.tanh(self.norm(self.conv(images)))
            x, _ = self.rows(x.flatten(2).transpose(1, 2))
            return self.head(self.attention(x).mean(1))

    return Network().double()


def parameter_gradients(model: torch.nn.Module, output: Tensor) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(output, torch.tensor([1, 0])).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


ALL_CALLS = {"conv2d": 1, "batch_norm": 1, "lstm": 1, "linear": 5, "attention": 1, "cross_entropy": 1}


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant", "selective"])
def test_recomputation_in_backward_repeats_the_forward_pass(network: torch.nn.Module, kind: str) -> None:
    """Dropout too: were backward to recompute with torch's attention, it would drop other weights."""
    x = normal(2, 3, 5, 6)

    def keep_products(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        kept = operator in (torch.ops.dlkernels.linear.default, torch.ops.dlkernels.conv2d.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": kind == "reentrant"}
    if kind == "selective":
        options["context_fn"] = lambda: create_selective_checkpoint_contexts(keep_products)
    network.norm.eval()  # recomputation moves the statistics twice, in torch too
    with dlkernels.override() as log:
        torch.manual_seed(3)
        expected = parameter_gradients(network, network(x))
        calls = dict(log.calls)
        torch.manual_seed(3)
        actual = parameter_gradients(network, checkpoint(network, x, **options))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert calls == ALL_CALLS and log.fallbacks == []
    assert log.calls["conv2d"] == 3  # alone, in the forward pass, again in backward


@primary
def test_second_gradients_are_those_of_torch(case: Case) -> None:
    def second(active: bool) -> list[Tensor]:
        sample = case.build(torch.float64).requiring_grad()
        with dlkernels.override() if active else torch.enable_grad():
            inputs = [sample.args[i] for i in sample.differentiable()]
            total = sum((o.square().sum() for o in call(case.reference, sample)), torch.zeros(()).double())
            first = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
            penalty = sum((g.square().sum() for g in first), torch.zeros(()).double())
            return list(torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True))

    torch.testing.assert_close(second(True), second(False), rtol=1e-7, atol=1e-7)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x + 1])),
    "gradients of each example": lambda f, x: torch.vmap(torch.func.grad(f))(torch.stack([x, x + 1])),
    "forward mode": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos(), strict=True),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.conv2d(x.view(1, 2, 4, 4), torch.ones(3, 2, 3, 3).double()).square().sum(),
        lambda x: F.batch_norm(x.view(4, 8), None, None, training=True).pow(3).sum(),
        lambda x: F.linear(x.view(4, 8), torch.eye(8)[:5].double()).square().sum(),
        lambda x: F.cross_entropy(x.view(4, 8), torch.tensor([1, 7, 0, 3])),
        lambda x: F.scaled_dot_product_attention(*[x.view(2, 4, 4)] * 3).square().sum(),
    ],
    ids=["conv2d", "batch_norm", "linear", "cross_entropy", "attention"],
)
def test_transforms_of_functions_are_torchs(function: Callable[[Tensor], Tensor], transform: str) -> None:
    x = torch.randn(32, dtype=torch.float64)
    expected = TRANSFORMS[transform](function, x)
    with dlkernels.override() as log:
        actual = TRANSFORMS[transform](function, x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    if transform != "forward mode":  # of torch.autograd.functional: two ordinary backward passes
        assert log.calls == {} and {f.reason for f in log.fallbacks} == {"inside a transform of torch.func"}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_function_compiles_whole_and_once_around_and_inside(dynamic: bool) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten()
    )

    def loss(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        features = model(x)
        return F.cross_entropy(features @ weight.t(), labels) + F.linear(features, weight).mean()

    def inside(x: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        with dlkernels.override(skip=["batch_norm"]):
            return loss(x, labels, weight)

    weight = torch.randn(5, 36, requires_grad=True)
    batches = [(torch.randn(n, 3, 8, 9), torch.arange(n) % 5, weight) for n in ((4, 6, 7) if dynamic else (4, 4, 4))]
    for function, around in ((loss, True), (inside, False)):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
        compiled_once = 0
        for batch in batches:
            with dlkernels.override(skip=() if around else ["linear"]):
                actual = with_gradients(compiled, *batch)
            torch.testing.assert_close(actual, with_gradients(loss, *batch), rtol=1e-4, atol=1e-5)
            compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once
        operators = {str(node.target) for node in counter.graphs[-1].graph.nodes if node.op == "call_function"}
        ours = {name for name in operators if name.startswith("dlkernels.")}
        assert {"dlkernels.conv2d.default", "dlkernels.linear.default", "dlkernels.cross_entropy.default"} <= ours
        assert ("dlkernels.batch_norm.default" in ours) == around
        compiled(*batches[0])  # outside, which is compiled for itself
        assert counter.frame_count > compiled_once


@pytest.mark.usefixtures("fresh_compiler")
def test_transforms_compile_too() -> None:
    weight = torch.randn(4, 3, 3, 3)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: functional.conv2d(x, weight).square().sum())(x)

    x = torch.randn(2, 3, 5, 5)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gradient(x))


def test_inference_mode() -> None:
    with torch.inference_mode(), dlkernels.override() as log:
        linear()
    assert log.calls == {"linear": 1}
