"""What is particular to the linear layer: operands of any strides, empty sizes, a weight of one dimension, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dlkernels import functional as F
from dlkernels import nn

from .cases import normal


def exact_integers(*shape: int, seed: int) -> Tensor:
    """Small integers, whose products and sums float32 holds exactly."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def results(function: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The output, and all gradients for an incoming gradient of small integers."""
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias) if t is not None]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output, leaves, exact_integers(*output.shape, seed=9))]


@given(
    rows=st.integers(0, 40),
    features=st.integers(0, 60),
    outputs=st.integers(0, 60),
    bias=st.booleans(),
    transposed=st.tuples(st.booleans(), st.booleans()),
)
def test_any_shape_gives_every_bit_of_what_torch_gives(
    rows: int, features: int, outputs: int, bias: bool, transposed: tuple[bool, bool]
) -> None:
    input, weight = exact_integers(rows, features, seed=1), exact_integers(outputs, features, seed=2)
    input, weight = (t.t().contiguous().t() if flip else t for t, flip in zip((input, weight), transposed, strict=True))
    arguments = (input, weight, exact_integers(outputs, seed=3) if bias else None)
    for ours, theirs in zip(
        results(F.linear, *arguments), results(torch.nn.functional.linear, *arguments), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 70])
@pytest.mark.parametrize("flip", [False, True], ids=["rows_contiguous", "columns_contiguous"])
def test_rows_of_every_number_read_weights_as_they_lie(rows: int, flip: bool, dtype: torch.dtype, isa: str) -> None:
    input, weight, bias = (
        normal(rows, 201, seed=1, dtype=dtype),
        normal(77, 201, seed=2, dtype=dtype),
        normal(77, seed=3, dtype=dtype),
    )
    weight = weight.t().contiguous().t() if flip else weight
    expected = torch.nn.functional.linear(input.double(), weight.double(), bias.double())
    difference = F.linear(input, weight, bias).double() - expected
    assert difference.norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_sums_over_more_rows_than_a_task_takes_are_accurate() -> None:
    gradient = normal(10_000, 33, seed=4, dtype=torch.float32) + 1
    input, weight = torch.zeros(10_000, 2), torch.zeros(33, 2)
    grad_bias = torch.ops.dlkernels.linear_backward(gradient, input, weight, [False, False, True])[2]
    torch.testing.assert_close(grad_bias.double(), gradient.double().sum(0), rtol=3e-7, atol=0)


def test_a_weight_of_one_dimension_gives_one_feature_without_a_dimension() -> None:
    input, weight, bias = (
        normal(2, 3, 5, seed=1, dtype=torch.float64),
        torch.ones(5).double(),
        torch.tensor(2.0).double(),
    )
    assert torch.equal(F.linear(input, weight, bias), F.linear(input, weight.unsqueeze(0), bias.view(1)).squeeze(-1))
    torch.testing.assert_close(F.linear(input, weight), torch.nn.functional.linear(input, weight))
    assert F.linear(input[0, 0], weight).shape == ()


def test_one_number_is_the_bias_of_every_feature() -> None:
    input, weight = normal(4, 3, seed=1, dtype=torch.float32), normal(6, 3, seed=2, dtype=torch.float32)
    for bias in (torch.tensor(2.5), torch.tensor([2.5])):
        leaf = bias.requires_grad_()
        output = F.linear(input, weight, leaf)
        torch.testing.assert_close(output, torch.nn.functional.linear(input, weight) + 2.5)
        assert torch.autograd.grad(output.sum(), leaf)[0].item() == 24


def test_the_wider_type_of_autocast_is_left_for_the_lower() -> None:
    module = nn.Linear(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(3, 7)).dtype == torch.bfloat16


def test_the_module_trains_the_parameters_of_torchs() -> None:
    theirs = torch.nn.Linear(6, 4)
    ours = nn.Linear(6, 4)
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(3, 6)
    for module in (ours, theirs):
        module(input).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize(
    ("input", "weight", "bias", "message"),
    [
        ((2, 3), (4, 5), None, "mat1 and mat2 shapes cannot be multiplied (2x3 and 5x4)"),
        ((2, 2, 3), (4, 5), None, "mat1 and mat2 shapes cannot be multiplied (4x3 and 5x4)"),
        ((2, 3), (4, 3), (3,), "bias must have shape [4], got [3]"),
        ((2, 3), (2, 4, 3), None, "weight must have shape [out_features, in_features], got [2, 4, 3]"),
        ((), (4, 1), None, "need to be at least 1D, but input is 0D"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(
    input: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        F.linear(torch.ones(input), torch.ones(weight), None if bias is None else torch.ones(bias))


def test_integers_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="input is Long, expected float32"):
        F.linear(torch.ones(2, 3).long(), torch.ones(4, 3).long())


def test_a_gradient_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError, match=re.escape("grad_output has shape [2, 5], expected [2, 4]")):
        torch.ops.dlkernels.linear_backward(torch.ones(2, 5), torch.ones(2, 3), torch.ones(4, 3), [True, True, True])


@pytest.mark.parametrize("way", ["data", "numpy"])
def test_linear_follows_every_write_to_its_weight(way: str) -> None:
    """Neither of these moves the weight's version counter: nothing derived from a weight may outlive a call."""
    weight = torch.nn.Parameter(normal(96, 64, seed=1, dtype=torch.float32))
    input = normal(32, 64, seed=2, dtype=torch.float32)
    with torch.no_grad():
        for _ in range(3):
            F.linear(input, weight)
        version = weight._version
        if way == "data":
            weight.data.mul_(-2)
        else:
            weight.detach().numpy()[...] *= -2
        assert weight._version == version
        torch.testing.assert_close(F.linear(input, weight), torch.nn.functional.linear(input, weight))
