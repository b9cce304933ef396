"""Products on matrix units: float32 from bfloat16 parts, as accurate as torch's precision setting asks for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dlkernels import _C, nn
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
    "many_pixels": ((3, 20, 17, 19), 40, 3, {"padding": 1}),
    "many_pixels_strided": ((2, 33, 31, 30), 24, 3, {"stride": 2, "padding": 1}),
    "few_pixels": ((4, 24, 9, 9), 208, 3, {"padding": 1, "stride": 2}),
    "stem": ((2, 3, 37, 40), 33, 7, {"stride": 2, "padding": 3}),
    "patches": ((2, 3, 41, 32), 40, 8, {"stride": 8}),
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
@pytest.mark.parametrize("name", ["3x3", "strided", "many_pixels", "few_pixels", "stem", "patches"])
def test_a_convolution_with_infinity_is_that_of_float32(where: str, dtype: torch.dtype, name: str) -> None:
    shape, out_channels, kernel, options = CONVOLUTIONS[name]
    x, w = normal(*shape).to(dtype), normal(out_channels, shape[1], kernel, kernel, seed=1).to(dtype)
    (x if where == "input" else w)[0, 2, 1, 1] = float("inf")
    results = []
    for function, wide in ((F.conv2d, dtype), (torch.nn.functional.conv2d, torch.float32)):
        leaves = [t.to(wide).requires_grad_() for t in (x, w)]
        output = function(*leaves, **options)
        grad = normal(*output.shape, seed=2).to(dtype).to(wide)
        results.append([output, torch.autograd.grad(output, leaves[1], grad)[0]])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        finite = expected.isfinite()
        assert error(actual[finite], expected[finite].double()) <= (2e-6 if dtype == torch.float32 else 4e-3)


ATTENTIONS = {  # queries, keys, head size, value size, query heads, kv heads, is_causal
    "edges": (70, 45, 40, 24, 2, 2, False),
    "causal": (150, 150, 64, 64, 2, 2, True),
    "causal_edges": (203, 199, 33, 65, 1, 1, True),
    "many_keys": (33, 700, 32, 32, 2, 2, False),
    "shared_keys": (37, 64, 64, 64, 6, 2, True),
}


def attention_operands(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, bool]]:
    queries, keys, head_size, value_size, heads, kv_heads, is_causal = ATTENTIONS[name]
    shapes = (2, heads, queries, head_size), (2, kv_heads, keys, head_size), (2, kv_heads, keys, value_size)
    operands = [normal(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    return operands, {"is_causal": is_causal, "enable_gqa": heads != kv_heads}


# torch takes no mask beside is_causal.
@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, masked) for name in ATTENTIONS for masked in ([False] if ATTENTIONS[name][-1] else [False, True])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention(name: str, masked: bool, dtype: torch.dtype) -> None:
    operands, options = attention_operands(name, dtype)
    mask = normal(operands[0].shape[-2], operands[1].shape[-2], seed=5).to(dtype) if masked else None
    results = []
    for function, wide in (
        (F.scaled_dot_product_attention, dtype),
        (torch.nn.functional.scaled_dot_product_attention, torch.float64),
    ):
        leaves = [t.to(wide).requires_grad_() for t in operands]
        output = function(*leaves, attn_mask=None if mask is None else mask.to(wide), **options)
        grad = normal(*output.shape, seed=9).to(dtype).to(wide)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    bound = {torch.float32: 3e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
    for actual, exact in zip(*results, strict=True):
        assert error(actual, exact) <= bound


@pytest.mark.parametrize(("precision", "least", "most"), PRECISIONS)
def test_attention_has_the_error_of_the_precision_setting(precision: str, least: float, most: float) -> None:
    operands, options = attention_operands("causal", torch.float32)
    exact = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in operands), **options)
    torch.set_float32_matmul_precision(precision)
    assert least <= error(F.scaled_dot_product_attention(*operands, **options), exact) <= most


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_attention_to_what_cannot_be_split_is_that_of_float32(which: str, value: float) -> None:
    operands, options = attention_operands("edges", torch.float32)
    if which != "value":  # the score that the largest number gives is an ordinary one
        operands[which == "query"][..., 3] *= 1e-37
    operands[("query", "key", "value").index(which)][0, 1, 20, 3] = value
    leaves = [t.requires_grad_() for t in operands]
    actual, expected = (
        function(*leaves, **options)
        for function in (F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    gradients = [torch.autograd.grad(output, leaves, torch.ones_like(output)) for output in (actual, expected)]
    untouched = [[g[1] for g in side] for side in gradients]  # the other sequence of the batch
    torch.testing.assert_close(*untouched, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(9, 8, 40, 72), (5, 20, 33, 32), (3, 40, 70, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lstm_in_half_types(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    steps, batch, inputs, hidden = sizes
    torch.manual_seed(0)
    wide = torch.nn.LSTM(inputs, hidden, bidirectional=True).to(dtype).double()
    ours = nn.LSTM(inputs, hidden, bidirectional=True).to(dtype)
    ours.load_state_dict(wide.state_dict())
    x = normal(steps, batch, inputs).to(dtype)
    lengths = torch.arange(batch, 0, -1).clamp(max=steps)
    results = []
    for module in (ours, wide):
        leaf = x.to(next(module.parameters()).dtype).requires_grad_()
        packed, (h_n, c_n) = module(torch.nn.utils.rnn.pack_padded_sequence(leaf, lengths))
        grads = torch.autograd.grad(packed.data, [leaf, *module.parameters()], normal(*packed.data.shape).to(leaf))
        results.append([packed.data, h_n, c_n, *grads])
    bound = {torch.bfloat16: 8e-3, torch.float16: 8e-4}[dtype]
    for actual, exact in zip(*results, strict=True):
        assert error(actual, exact) <= bound


@pytest.mark.parametrize("where", ["input", "weight", "state"])
def test_an_lstm_with_infinity_is_that_of_float32(where: str) -> None:
    torch.manual_seed(0)
    ours, wide = nn.LSTM(40, 64).bfloat16(), torch.nn.LSTM(40, 64)
    ours.load_state_dict(wide.state_dict())
    wide.load_state_dict(ours.state_dict())
    x, state = normal(6, 20, 40).bfloat16(), normal(1, 20, 64, seed=1).bfloat16()
    {"input": x[2, 3], "weight": ours.weight_hh_l0.data[7], "state": state[0, 4]}[where][5] = float("inf")
    wide.load_state_dict(ours.state_dict())
    actual, _ = ours(x, (state, torch.zeros_like(state)))
    expected, _ = wide(x.float(), (state.float(), torch.zeros(1, 20, 64)))
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)
