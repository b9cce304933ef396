"""The vector functions against float64, over every exponent, within the errors that csrc/cpu/vmath.h states."""

from __future__ import annotations

import math

import pytest
import torch

from dlkernels import _C

# Largest error in units in the last place of the exact result.
LARGEST_ERROR = {"exp": 1.1, "log": 1.0, "tanh": 1.6, "sigmoid": 2.5}
INF, NAN = math.inf, math.nan


def every_exponent() -> torch.Tensor:
    """About a million floats: 2,048 mantissas for each sign and exponent, subnormal ones too."""
    exponents = torch.arange(255, dtype=torch.int64).view(-1, 1) << 23
    mantissas = torch.arange(0, 1 << 23, 4096, dtype=torch.int64) + 1237
    bits = (exponents + mantissas).flatten()
    return torch.cat([bits, bits | (1 << 31)]).to(torch.uint32).view(torch.float32)


def ulp_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference in units in the last place of float32 at the exact value, subnormals included."""
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp_min(-149))
    return float(((actual.double() - exact).abs() / unit).max())


@pytest.mark.parametrize("name", LARGEST_ERROR)
def test_errors_stay_within_the_stated_ones(name: str, processor_isa: str) -> None:
    x = every_exponent()
    dense = torch.linspace(-110, 110, 1_000_003)
    x = torch.cat([x, dense, dense / 50])
    if name == "log":
        x = x.abs()
    actual, exact = _C.elementary_function(name, x), getattr(torch, name)(x.double())
    largest = torch.finfo(torch.float32).max
    rounds_to_infinity = exact > largest
    assert actual[rounds_to_infinity].isposinf().all()
    kept = ~rounds_to_infinity
    error = ulp_error(actual[kept], exact[kept])
    assert error <= LARGEST_ERROR[name], error


@pytest.mark.parametrize(("name", "largest"), [("exp_of_negative", 1.4e-7), ("coarse_exp2_of_negative", 4e-6)])
def test_exponentials_of_a_softmax_are_exact_or_zero(name: str, largest: float, processor_isa: str) -> None:
    x = -torch.cat([every_exponent().abs(), torch.linspace(0, 130, 1_000_003)])
    exact = torch.exp(x.double()) if name == "exp_of_negative" else torch.exp2(x.double())
    actual = _C.elementary_function(name, x)
    is_normal = exact > 1.000001 * torch.finfo(torch.float32).tiny
    assert float(((actual.double() - exact).abs() / exact)[is_normal].max()) <= largest
    assert (actual[exact < 0.999999 * torch.finfo(torch.float32).tiny] == 0).all()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("exp_of_negative", [(0.0, 1.0), (-0.0, 1.0), (-INF, 0.0), (-88.0, 0.0), (-1e30, 0.0)]),
        ("coarse_exp2_of_negative", [(-INF, 0.0), (-127.0, 0.0), (-1e30, 0.0)]),
        ("exp", [(0.0, 1.0), (-0.0, 1.0), (INF, INF), (-INF, 0.0), (89.0, INF), (-104.0, 0.0)]),
        ("log", [(1.0, 0.0), (0.0, -INF), (-0.0, -INF), (INF, INF), (-1.0, NAN), (-INF, NAN)]),
        ("tanh", [(0.0, 0.0), (INF, 1.0), (-INF, -1.0), (1e-40, 1e-40)]),
        ("sigmoid", [(0.0, 0.5), (-0.0, 0.5), (INF, 1.0), (-INF, 0.0)]),
    ],
)
def test_special_values(name: str, values: list[tuple[float, float]], processor_isa: str) -> None:
    points, expected = torch.tensor([*values, (NAN, NAN)]).unbind(1)
    points = points.contiguous()
    torch.testing.assert_close(_C.elementary_function(name, points), expected, rtol=0, atol=0, equal_nan=True)


def test_a_tail_is_computed_like_the_body(processor_isa: str) -> None:
    x = torch.linspace(-3, 3, 37)
    for name in ("exp", "tanh", "sigmoid"):
        whole = _C.elementary_function(name, x)
        for count in range(37):
            assert torch.equal(_C.elementary_function(name, x[:count].clone()), whole[:count])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="name must be one of .*exp.*tanh.*, got sin"):
        _C.elementary_function("sin", torch.ones(3))
    with pytest.raises(RuntimeError, match="contiguous float32 tensor"):
        _C.elementary_function("exp", torch.ones(3, dtype=torch.float64))
