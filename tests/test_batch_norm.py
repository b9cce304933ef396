"""What is particular to batch norm: running statistics, layouts, fusion, errors, modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dlkernels
from dlkernels import functional as F
from dlkernels.ops.batch_norm import BatchNormFunction

MODULES = [
    (dlkernels.nn.BatchNorm1d, torch.nn.BatchNorm1d, (6, 5)),
    (dlkernels.nn.BatchNorm1d, torch.nn.BatchNorm1d, (4, 5, 7)),
    (dlkernels.nn.BatchNorm2d, torch.nn.BatchNorm2d, (3, 5, 4, 6)),
    (dlkernels.nn.BatchNorm3d, torch.nn.BatchNorm3d, (2, 5, 3, 4, 2)),
]
modules = pytest.mark.parametrize(("ours", "theirs", "shape"), MODULES, ids=lambda v: getattr(v, "__name__", None))


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with parameters that are not all ones and zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@modules
def test_modules_train_and_evaluate_as_torch_does(
    ours: type, theirs: type, shape: tuple[int, ...], momentum: float | None
) -> None:
    expected = filled(theirs(5, momentum=momentum))
    actual = ours(5, momentum=momentum)
    actual.load_state_dict(expected.state_dict(), strict=True)
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 3 + 5
        torch.testing.assert_close(actual(x), expected(x))
    torch.testing.assert_close(actual.state_dict(), expected.state_dict())
    expected.load_state_dict(actual.state_dict(), strict=True)
    torch.testing.assert_close(actual.eval()(x), expected.eval()(x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
@modules
def test_modules_without_parameters_or_statistics(
    ours: type, theirs: type, shape: tuple[int, ...], options: dict[str, bool]
) -> None:
    actual, expected = ours(5, **options), theirs(5, **options)
    x = torch.randn(shape)
    for training in (True, False):
        torch.testing.assert_close(actual.train(training)(x), expected.train(training)(x))


@modules
def test_modules_are_torchs_to_look_at_and_to_copy(ours: type, theirs: type, shape: tuple[int, ...]) -> None:
    module = filled(ours(5))
    assert isinstance(module, theirs)
    assert repr(module) == repr(theirs(5))
    x = torch.randn(shape)
    expected = copy.deepcopy(module)(x)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)


def test_half_inputs_take_float32_parameters() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    mean, var = torch.zeros(3), torch.ones(3)
    weight, bias = torch.rand(3, requires_grad=True), torch.rand(3, requires_grad=True)
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert [t.dtype for t in (y, mean, *grads)] == [torch.bfloat16, torch.float32, torch.bfloat16] + 2 * [torch.float32]


@pytest.mark.parametrize("shape", [(3, 18, 7, 9), (2, 5, 3, 4, 5), (2, 64, 33, 31), (3, 150, 9, 9)])
def test_channels_last_is_native_and_gives_the_same_bits(shape: tuple[int, ...], processor_isa: str) -> None:
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, residual = torch.randn(shape) * 2 + 1, torch.randn(shape)
    weight, bias, g = torch.randn(shape[1]), torch.randn(shape[1]), torch.randn(shape)
    results = []
    for fmt in (torch.contiguous_format, memory_format):
        leaves = [t.contiguous(memory_format=fmt).requires_grad_() for t in (x, residual)]
        leaves += [t.clone().requires_grad_() for t in (weight, bias)]
        y = F.batch_norm(
            leaves[0], None, None, leaves[2], leaves[3], training=True, activation="relu", residual=leaves[1]
        )
        assert y.is_contiguous(memory_format=fmt)
        results.append([y, *torch.autograd.grad(y, leaves, g.contiguous(memory_format=fmt))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2000, 3), (8, 3, 40, 40)])
def test_statistics_survive_a_mean_far_from_zero(shape: tuple[int, ...]) -> None:
    """Mean 1000 standard deviations away: E[x^2] - mean^2 would have no correct digit."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1000
    exact = torch.nn.functional.batch_norm(x.float().double(), None, None, training=True)
    actual = F.batch_norm(x.float(), None, None, training=True)
    theirs = torch.nn.functional.batch_norm(x.float(), None, None, training=True)
    assert (actual.double() - exact).abs().max() <= (theirs.double() - exact).abs().max() + 1e-6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_survive_a_mean_far_from_zero(layout: torch.memory_format) -> None:
    """A gradient that follows the input meets the mean's own rounding: half a unit of its last place."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 5, 9, 7, generator=generator) + 1e5).contiguous(memory_format=layout)
    grad = x - 1e5
    results = []
    for dtype, function in ((torch.float32, F.batch_norm), (torch.float64, torch.nn.functional.batch_norm)):
        leaf = x.to(dtype).requires_grad_()
        results.append(torch.autograd.grad(function(leaf, None, None, training=True), leaf, grad.to(dtype))[0])
    assert (results[0].double() - results[1]).abs().max() < 3e-6


def test_fused_relu_and_residual_are_the_separate_operators() -> None:
    x, residual = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    plain = F.batch_norm(x, None, None, training=True)
    assert torch.equal(F.batch_norm(x, None, None, training=True, activation="relu"), plain.relu())
    fused = F.batch_norm(x, None, None, training=True, activation="relu", residual=residual)
    assert torch.equal(fused, (plain + residual).relu())
    fused = F.batch_norm(x, None, None, training=True, activation="relu6", residual=8 * residual)
    assert torch.equal(fused, torch.nn.functional.relu6(plain + 8 * residual))
    assert fused.eq(6).any()
    summed = F.batch_norm(x, None, None, training=True, residual=residual)
    assert torch.equal(summed, plain + residual)


def test_running_statistics_move_once_a_call_and_only_when_training() -> None:
    x = torch.randn(8, 3, 4)
    mean, var = torch.zeros(3), torch.ones(3)
    F.batch_norm(x, mean, var, training=False)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))
    F.batch_norm(x, mean, var, training=True, momentum=0.25)
    torch.testing.assert_close(mean, 0.25 * x.mean((0, 2)))
    torch.testing.assert_close(var, 0.75 + 0.25 * x.var((0, 2), unbiased=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_subnormal_results_are_not_flushed_to_zero(dtype: torch.dtype, isa: str) -> None:
    smallest = torch.finfo(dtype).tiny
    x = torch.arange(-40, 41).mul(smallest / 16).to(dtype)[None]
    zeros, ones = torch.zeros(81), torch.ones(81)
    assert torch.equal(F.batch_norm(x, zeros, ones, eps=0.0), x)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True)
    y = F.batch_norm(x, None, None, weight, training=True)
    assert y.shape == x.shape
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert torch.equal(grads[1], torch.zeros(shape[1]))


def bad(**changes: object) -> dict[str, object]:
    arguments = {"input": torch.randn(4, 3, 5), "running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(running_var=torch.ones(4)), RuntimeError, "running_var should contain 3 elements not 4"),
        (bad(running_mean=None), RuntimeError, "running_mean must be defined in evaluation mode"),
        (bad(weight=torch.ones(4)), RuntimeError, "weight should contain 3 elements not 4"),
        (bad(bias=torch.ones(2)), RuntimeError, "bias should contain 3 elements not 2"),
        (bad(input=torch.ones(4, 3, dtype=torch.long)), NotImplementedError, "input is Long"),
        (bad(input=torch.randn(3)), RuntimeError, r"input must have shape \[N, C"),
        (bad(input=torch.randn(1, 3), training=True), ValueError, "Expected more than 1 value per channel"),
        (bad(weight=torch.ones(3).double()), RuntimeError, "mixed dtype: weight is Double, expected Float"),
        (bad(training=True, eps=-1.0), ValueError, "eps must be positive during training, but got -1"),
        (bad(activation="gelu"), ValueError, "activation must be None, 'relu' or 'relu6', got 'gelu'"),
        (bad(residual=torch.randn(4, 3, 6)), RuntimeError, "residual must have the shape of input"),
        (bad(residual=torch.randn(4, 3, 5).half()), RuntimeError, "residual must have the type of input"),
        (bad(running_mean=torch.zeros(3, requires_grad=True)), RuntimeError, "not differentiable .* 'running_mean'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        F.batch_norm(**arguments)  # type: ignore[arg-type]


def test_the_function_class_gives_the_same_bits() -> None:
    leaves = [torch.randn(4, 3, 5, requires_grad=True), *(torch.randn(3, requires_grad=True) for _ in range(2))]
    g = torch.randn(4, 3, 5)
    expected = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, activation="relu")
    actual, mean, variance = BatchNormFunction.apply(*leaves, None, None, None, True, 1e-5, "relu")
    assert torch.equal(actual, expected) and not mean.requires_grad and not variance.requires_grad
    for a, b in zip(torch.autograd.grad(actual, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.equal(a, b)


@given(
    shape=st.lists(st.integers(1, 19), min_size=2, max_size=5).filter(lambda s: 1 < torch.Size(s).numel() // s[1]),
    affine=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_torch(shape: list[int], affine: bool, training: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = draw(*shape).requires_grad_()
    parameters = [draw(shape[1]).requires_grad_() for _ in range(2)] if affine else [None, None]
    statistics = [draw(shape[1]), draw(shape[1]).abs() + 0.1]
    results = []
    for function in (F.batch_norm, torch.nn.functional.batch_norm):
        moved = [s.clone() for s in statistics]
        y = function(x, *moved, *parameters, training=training)
        leaves = [x, *(p for p in parameters if p is not None)]
        results.append([y, *moved, *torch.autograd.grad(y, leaves, y.detach().cos())])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Identity])
def test_norm_and_activation_are_one_kernel_until_somebody_looks(
    activation: type[torch.nn.Module], training: bool, with_residual: bool
) -> None:
    norm, relu = filled(dlkernels.nn.BatchNorm2d(5)).train(training), activation()
    peer = filled(torch.nn.BatchNorm2d(5)).train(training)
    x, residual = torch.randn(3, 5, 4, 6), torch.randn(3, 5, 4, 6) if with_residual else None
    expected = relu(peer(x) if residual is None else peer(x) + residual)
    with torch.profiler.profile() as profile:
        fused = dlkernels.nn.norm_activation(norm, relu, x, residual)
    names = {event.key for event in profile.key_averages()}
    assert "dlkernels::batch_norm" in names
    assert not names & {"aten::relu", "aten::hardtanh", "aten::clamp"}
    assert training or "aten::add" not in names  # which moves the running statistics
    torch.testing.assert_close(fused, expected)
    normalized = peer.eval()(x)
    other = dlkernels.nn.norm_activation(peer, relu, x, residual)
    torch.testing.assert_close(other, relu(normalized if residual is None else normalized + residual))

    seen: list[torch.Tensor] = []
    relu.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(dlkernels.nn.norm_activation(norm, relu, x, residual), expected)
    assert len(seen) == 1


def test_a_residual_of_another_type_is_added_as_torch_adds_it() -> None:
    """As under autocast, where a convolution's output is bfloat16 and what skips it may be float32."""
    norm, relu = dlkernels.nn.BatchNorm2d(5), torch.nn.ReLU()
    x, residual = torch.randn(3, 5, 4, 6, dtype=torch.bfloat16), torch.randn(3, 5, 4, 6)
    result = dlkernels.nn.norm_activation(norm, relu, x, residual)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, relu(torch.nn.BatchNorm2d(5)(x) + residual), rtol=1e-2, atol=1e-2)
