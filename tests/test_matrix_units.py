"""Products on matrix units: float32 from bfloat16 parts, as accurate as torch's precision setting asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels import _C
from dlkernels import functional as F

WITH_TILES = [name for name in _C.available_isas() if name.startswith("amx")]

pytestmark = pytest.mark.skipif(not WITH_TILES, reason="no AMX here, nor a build that emulates it")


@pytest.fixture(params=WITH_TILES, autouse=True)
def tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs every test on each instruction set with tiles."""
    chosen, precision = _C.isa(), torch.get_float32_matmul_precision()
    assert _C.select_isa(request.param)
    yield
    _C.select_isa(chosen)
    torch.set_float32_matmul_precision(precision)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(a: Tensor, b: Tensor) -> Tensor:
    return F.linear(a, b)  # a b^T


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


PRECISIONS = [("highest", 0, 3e-7), ("high", 1e-6, 1e-5), ("medium", 1e-3, 1e-2)]


@pytest.mark.parametrize(("precision", "least", "most"), PRECISIONS)
def test_the_error_is_that_of_the_precision_setting(precision: str, least: float, most: float) -> None:
    a, b = normal(150, 700), normal(90, 700, seed=1)
    torch.set_float32_matmul_precision(precision)
    assert least <= error(product(a, b), a.double() @ b.double().T) <= most


EDGES = [(8, 8, 16), (16, 33, 31), (33, 16, 32), (97, 513, 257), (9, 40, 5000), (900, 1100, 64)]


@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_tiles_blocks_and_runs(shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    a, b = normal(rows, depth), normal(columns, depth, seed=1)
    assert error(product(a, b), a.double() @ b.double().T) < 3e-7
    a, b = a.mul(2).round().clamp(-3, 3), b.mul(2).round().clamp(-3, 3)
    assert torch.equal(product(a, b), (a.double() @ b.double().T).float())
    assert torch.equal(product(a.T.contiguous().T, b.T.contiguous().T), product(a, b))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_cannot_be_split_comes_out_as_float32_has_it(value: float, side: str) -> None:
    a, b = normal(200, 300), normal(40, 300, seed=1)
    (a if side == "left" else b)[17, 123] = value
    actual, expected = product(a, b), a @ b.T
    special = ~expected.isfinite()
    torch.testing.assert_close(actual[special], expected[special], equal_nan=True)
    torch.testing.assert_close(actual[~special], expected[~special], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_every_bit(dtype: torch.dtype) -> None:
    a, b = normal(64, 256).to(dtype), normal(48, 256, seed=1).to(dtype)
    exact = (a.double() @ b.double().T).to(dtype)
    assert error(product(a, b), exact.double()) <= 1e-4  # one rounding now and then the other way


@pytest.mark.parametrize("shape", [(75, 40, 256), (64, 33, 100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_give_the_same_bits_however_they_lie(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    a, b = normal(rows, depth).to(dtype), normal(columns, depth, seed=1).to(dtype)
    apart = torch.zeros(rows, 2 * depth, dtype=dtype)[:, 1::2].copy_(a)
    expected = product(a, b)
    assert torch.equal(product(a.T.contiguous().T, b.T.contiguous().T), expected)
    assert torch.equal(product(apart, b), expected)


CONVOLUTIONS = {  # input shape, output channels, kernel, and the rest of the arguments
    "3x3": ((2, 40, 9, 11), 48, 3, {"padding": 1}),
    "whole_rows_of_tiles": ((1, 32, 8, 32), 64, 3, {"padding": 1}),
    "1x1": ((3, 64, 7, 5), 33, 1, {}),
    "strided": ((2, 17, 20, 19), 16, 3, {"stride": 2, "padding": 1}),
    "dilated_groups": ((1, 64, 12, 13), 96, 3, {"dilation": 2, "padding": 2, "groups": 2}),
    "many_channels": ((1, 300, 6, 6), 290, 3, {"padding": 1}),
    "many_channels_and_pixels": ((2, 272, 7, 7), 260, 3, {"padding": 1}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    shape, out_channels, kernel, options = CONVOLUTIONS[name]
    x = normal(*shape).to(dtype)
    w = normal(out_channels, shape[1] // options.get("groups", 1), kernel, kernel, seed=1).to(dtype)
    bias = normal(out_channels, seed=2).to(dtype)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaves = [t.detach().to(memory_format=layout).requires_grad_() for t in (x, w)]
        output = F.conv2d(*leaves, bias, **options)
        results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    exact_leaves = [t.double().requires_grad_() for t in (x, w)]
    exact = torch.nn.functional.conv2d(*exact_leaves, bias.double(), **options)
    exacts = [exact, *torch.autograd.grad(exact, exact_leaves, torch.ones_like(exact))]
    bound = {torch.float32: 6e-7, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    for first, second, reference in zip(*results, exacts, strict=True):
        assert torch.equal(first, second)
        assert error(first, reference) <= bound


@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_with_infinity_is_that_of_float32(where: str, dtype: torch.dtype, stride: int) -> None:
    x, w = normal(1, 32, 10, 10).to(dtype), normal(32, 32, 3, 3, seed=1).to(dtype)
    (x if where == "input" else w)[0, 5, 1, 1] = float("inf")
    actual = F.conv2d(x, w, padding=1, stride=stride)
    expected = torch.nn.functional.conv2d(x.float(), w.float(), padding=1, stride=stride).to(dtype)
    close = 1e-4 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=close, atol=close, equal_nan=True)
