"""What is particular to scaled_dot_product_attention: masks, dropout, grouped queries, layouts, and the module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.common_modules import module_db

from dlkernels import functional as F
from dlkernels import nn
from dlkernels.ops.attention import AttentionFunction

from .cases import normal
from .cases.attention import reference


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float(((actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)).detach())


def assert_matches_reference(inputs: list[Tensor], **kwargs: Any) -> None:
    """Values and gradients of everything that requires one, against torch in float64."""
    leaves = [t for t in (*inputs, kwargs.get("attn_mask")) if t is not None and t.requires_grad]
    actual, expected = F.scaled_dot_product_attention(*inputs, **kwargs), reference(*inputs, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = normal(*expected.shape, seed=9, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), rtol=1e-11, atol=1e-11
    )


# ---- masks -------------------------------------------------------------------------------------------------------

MASK_SHAPES = [
    (5, 6),
    (6,),
    (1, 6),
    (5, 1),
    (1, 1),
    (3, 5, 6),
    (2, 1, 5, 6),
    (2, 3, 5, 6),
    (2, 1, 1, 6),
    (1, 3, 5, 1),
    (),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.float64, torch.float32], ids=str)
def test_masks_of_every_broadcastable_shape(shape: tuple[int, ...], kind: torch.dtype) -> None:
    inputs = tensors((2, 3, 5, 8), (2, 3, 6, 8), (2, 3, 6, 4))
    mask = normal(*shape, seed=5, dtype=torch.float64)
    if kind == torch.bool:
        actual = F.scaled_dot_product_attention(*inputs, attn_mask=mask > -1)
        additive = torch.zeros(()).double().masked_fill(~(mask > -1), -torch.inf).expand(5, 6) if not shape else None
        if additive is None:
            additive = torch.zeros_like(mask).masked_fill(~(mask > -1), -torch.inf)
        torch.testing.assert_close(actual, reference(*inputs, attn_mask=additive.expand(2, 3, 5, 6)))
        return
    mask = mask.to(kind).requires_grad_()
    actual = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    expected = reference(*inputs, attn_mask=mask.double().expand(2, 3, 5, 6))
    torch.testing.assert_close(actual, expected)
    grad = normal(*expected.shape, seed=9, dtype=torch.float64)
    leaves = [*inputs, mask]
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad))


@pytest.mark.parametrize("shape", [(70, 300), (1, 300), (70, 1), (2, 1, 300), (2, 70, 1)], ids=str)
def test_mask_gradient_over_several_blocks(shape: tuple[int, ...]) -> None:
    inputs = tensors((3, 2, 70, 8), (3, 2, 300, 8), (3, 2, 300, 8))
    assert_matches_reference(inputs, attn_mask=normal(*shape, seed=5, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("arrange", [lambda m: m.mT.contiguous().mT, lambda m: m.repeat_interleave(2, -1)[..., ::2]])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_mask_strides_never_change_a_bit(arrange: Any, kind: torch.dtype) -> None:
    inputs = tensors((2, 3, 40, 8), (2, 3, 70, 8), (2, 3, 70, 8), dtype=torch.float32)
    mask = normal(2, 1, 40, 70, seed=5, dtype=torch.float32)
    mask = mask > -1 if kind == torch.bool else mask
    results = []
    for m in (mask, arrange(mask)):
        output = F.scaled_dot_product_attention(*inputs, attn_mask=m)
        results.append([output, *torch.autograd.grad(output, inputs, torch.ones_like(output))])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_broadcast_mask_is_not_expanded_in_memory() -> None:
    """One row of 2^20 keys for 2^12 queries stands for 2^32 mask elements; only their own row may be touched."""
    query = torch.zeros(1, 1).expand(4096, 1)
    key = torch.zeros(1, 1).expand(2**20, 1)
    mask = torch.full((2**20,), -torch.inf)
    mask[-1] = 0
    value = torch.arange(2.0**20).unsqueeze(-1)
    output = F.scaled_dot_product_attention(query[:2], key, value, attn_mask=mask.expand(2, -1))
    assert torch.equal(output, torch.full((2, 1), 2.0**20 - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_queries_that_see_no_key_give_zeros_and_finite_gradients(dtype: torch.dtype, kind: str) -> None:
    inputs = tensors((2, 5, 8), (2, 6, 8), (2, 6, 8), dtype=dtype)
    visible = torch.ones(5, 6, dtype=torch.bool)
    visible[1] = visible[4] = False
    mask = (
        visible if kind == "bool" else torch.zeros(5, 6, dtype=dtype).masked_fill(~visible, -torch.inf).requires_grad_()
    )
    output = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert output[:, [1, 4]].eq(0).all() and output[:, 0].ne(0).any()
    leaves = inputs if kind == "bool" else [*inputs, mask]
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][:, [1, 4]].eq(0).all()
    expected = reference(*inputs, attn_mask=mask)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_causal_queries_see_keys_up_to_their_own_position() -> None:
    for queries, keys in ((5, 9), (9, 5), (300, 300), (130, 400), (400, 130)):
        assert_matches_reference(tensors((2, queries, 8), (2, keys, 8), (2, keys, 8)), is_causal=True)


def test_causal_never_reads_blocks_of_later_keys() -> None:
    query, key, value = (t.detach() for t in tensors(*((1, 700, 16),) * 3, dtype=torch.float32))
    key[:, 600:], value[:, 600:] = torch.nan, torch.nan
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert output[:, :512].isfinite().all() and output[:, 600:].isnan().all()


# ---- shapes ------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    size = st.integers(0, 20)
    queries, keys, head_size, value_size = (draw(size) for _ in range(4))
    batch = draw(st.lists(st.integers(1, 3), max_size=3))
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shapes = [(group * kv_heads, queries, head_size), (kv_heads, keys, head_size), (kv_heads, keys, value_size)]
    leading = [tuple(1 if draw(st.booleans()) and draw(st.booleans()) else b for b in batch) for _ in shapes]
    inputs = tensors(*(lead + shape for lead, shape in zip(leading, shapes, strict=True)))
    kwargs: dict[str, Any] = {"enable_gqa": group > 1, "scale": draw(st.sampled_from([None, 0.0, 0.7, -1.3]))}
    mask = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    full = torch.broadcast_shapes(*leading) + (group * kv_heads, queries, keys)
    shape = tuple(1 if draw(st.booleans()) else n for n in full)[draw(st.integers(0, len(batch) + 1)) :]
    values = normal(*shape, seed=draw(st.integers(0, 9)), dtype=torch.float64)
    kwargs["is_causal"] = mask == "causal"
    if mask in ("bool", "float"):
        kwargs["attn_mask"] = values > -0.5 if mask == "bool" else values.requires_grad_()
    return inputs, kwargs


@given(problems())
def test_any_shape_matches_the_composition(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
    inputs, kwargs = problem
    leaves = [t for t in (*inputs, kwargs.get("attn_mask")) if t is not None and t.requires_grad]
    actual, expected = F.scaled_dot_product_attention(*inputs, **kwargs), composition(*inputs, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    grad = normal(*expected.shape, seed=9, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(o, leaves, grad, materialize_grads=True) for o in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def composition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The formula, spelled out; torch's own rejects some empty shapes."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    factor = scale if scale is not None else 1 / max(query.shape[-1], 1) ** 0.5
    scores = query @ key.mT * factor
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    hidden = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0) @ value


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((0, 3, 4, 8), (0, 3, 5, 8), (0, 3, 5, 8)),
        ((2, 3, 0, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 3, 4, 8), (2, 3, 0, 8), (2, 3, 0, 8)),
        ((2, 3, 4, 0), (2, 3, 5, 0), (2, 3, 5, 8)),
        ((2, 3, 4, 8), (2, 3, 5, 8), (2, 3, 5, 0)),
    ],
)
def test_empty_dimensions(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    inputs = tensors(query, key, value, dtype=torch.float32)
    output = F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(output, composition(*inputs))
    for grad, leaf in zip(torch.autograd.grad(output, inputs, torch.ones_like(output)), inputs, strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 1), (2, 2), (6, 6), (2, 6), (3, 2)])
def test_grouped_queries(key_heads: int, value_heads: int) -> None:
    inputs = tensors((2, 6, 50, 8), (2, key_heads, 70, 8), (2, value_heads, 70, 5))
    assert_matches_reference(inputs, enable_gqa=True)
    assert_matches_reference(inputs, enable_gqa=True, is_causal=True)
    mask = normal(6, 50, 70, seed=5, dtype=torch.float64).requires_grad_()
    assert_matches_reference(inputs, enable_gqa=True, attn_mask=mask)


def test_many_batch_dimensions_and_exotic_strides() -> None:
    inputs = tensors((2, 1, 3, 2, 9, 8), (1, 4, 3, 2, 11, 8), (2, 4, 1, 1, 11, 6))
    assert_matches_reference(inputs)
    packed = normal(2, 9, 3, 4, 8, seed=1, dtype=torch.float64).requires_grad_()  # [B, L, (q, k, v), H, E]
    actual, expected = (
        f(*(packed[:, :, i].transpose(1, 2) for i in range(3)), is_causal=True)
        for f in (F.scaled_dot_product_attention, reference)
    )
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(o.square().sum(), packed) for o in (actual, expected)]
    torch.testing.assert_close(*grads)


def test_heads_inside_rows_stay_there() -> None:
    query = normal(2, 9, 4, 8, seed=1, dtype=torch.float32).transpose(1, 2).requires_grad_()
    output = F.scaled_dot_product_attention(query, query, query)
    assert output.transpose(1, 2).is_contiguous()
    assert torch.autograd.grad(output.sum(), query)[0].transpose(1, 2).is_contiguous()


def test_offsets_beyond_two_to_the_thirty_first() -> None:
    """2^33 logical elements over a few bytes of memory: the last batch entry must be found."""
    query = torch.zeros(1, 1, 1, 64).expand(2**27, 1, 1, 64)[-2:]
    key = normal(1, 1, 3, 64, seed=1, dtype=torch.float32)
    wide = torch.as_strided(torch.arange(64.0), (2**27, 3, 64), (0, 0, 1))
    output = F.scaled_dot_product_attention(query, key, wide.unsqueeze(1)[-2:])
    torch.testing.assert_close(output, torch.arange(64.0).expand(2, 1, 1, 64))


# ---- dropout -----------------------------------------------------------------------------------------------------


def kept_weights(dropout_p: float, queries: int = 200, keys: int = 300) -> Tensor:
    """The weights after dropout: the attention of the identity over equal scores."""
    zeros = torch.zeros(3, queries, 4), torch.zeros(3, keys, 4)
    return F.scaled_dot_product_attention(*zeros, torch.eye(keys).expand(3, -1, -1), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_rescales_it(dropout_p: float) -> None:
    torch.manual_seed(0)
    weights = kept_weights(dropout_p) * 300
    kept = weights != 0
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / (1 - dropout_p)))
    spread = (dropout_p * (1 - dropout_p)) ** 0.5
    for dimension in (None, (0, 1), (0, 2), (1, 2)):
        share = kept.double().mean(dimension) if dimension is not None else kept.double().mean()
        count = kept.numel() / share.numel()
        assert (share - (1 - dropout_p)).abs().max() < 5 * spread / count**0.5, dimension
    # Neighbours are independent along every dimension.
    centred = kept.double() - (1 - dropout_p)
    for dimension in range(3):
        size = centred.shape[dimension]
        pairs = centred.narrow(dimension, 0, size - 1) * centred.narrow(dimension, 1, size - 1)
        assert pairs.mean().abs() < 5 * spread**2 / pairs.numel() ** 0.5


def test_dropout_follows_torchs_seed_and_nothing_else(threads: None) -> None:
    torch.manual_seed(3)
    first, second = kept_weights(0.4), kept_weights(0.4)
    assert not torch.equal(first, second)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        torch.manual_seed(3)
        assert torch.equal(kept_weights(0.4), first) and torch.equal(kept_weights(0.4), second)
    state = torch.get_rng_state()
    kept_weights(0.0)
    assert torch.equal(torch.get_rng_state(), state)  # without dropout nothing is drawn


@pytest.mark.parametrize("grouped", [False, True])
def test_dropout_gradients_are_those_of_the_weights_that_were_kept(grouped: bool) -> None:
    kv_heads = 1 if grouped else 2
    query, key, value = tensors((2, 2, 150, 8), (2, kv_heads, 220, 8), (2, kv_heads, 220, 6))
    mask = normal(150, 220, seed=5, dtype=torch.float64).requires_grad_()
    torch.manual_seed(5)
    actual = F.scaled_dot_product_attention(query, key, value, mask, 0.3, enable_gqa=grouped)
    torch.manual_seed(5)
    identity = torch.eye(220, dtype=torch.float64).expand(2, kv_heads, -1, -1)
    kept = F.scaled_dot_product_attention(query, key, identity, mask, 0.3, enable_gqa=grouped).detach() != 0
    scores = query @ key.mT * 8**-0.5 + mask
    expected = scores.softmax(-1) * kept / 0.7 @ value
    torch.testing.assert_close(actual, expected)
    leaves = [query, key, value, mask]
    grad = normal(*expected.shape, seed=9, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad))


def test_dropping_everything_gives_zeros() -> None:
    inputs = tensors(*((2, 5, 8),) * 3, dtype=torch.float32)
    output = F.scaled_dot_product_attention(*inputs, dropout_p=1.0)
    assert output.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 5, 8),) * 3, {}),
        (((5, 4), (6, 4), (6, 3)), {"is_causal": True}),
        (((1, 4, 3, 8), (1, 2, 70, 8), (1, 2, 70, 4)), {"enable_gqa": True}),
        (((3, 1, 4, 2), (2, 5, 2), (3, 2, 5, 3)), {}),
    ],
    ids=["plain", "two_dimensions_causal", "grouped", "broadcast"],
)
def test_second_gradients_with_dropout(shapes: tuple[tuple[int, ...], ...], options: dict[str, Any]) -> None:
    def function(*inputs: Tensor) -> Tensor:
        torch.manual_seed(11)
        return F.scaled_dot_product_attention(*inputs, dropout_p=0.4, **options)

    assert torch.autograd.gradgradcheck(function, tensors(*shapes), fast_mode=True)


def test_second_gradients_where_everything_is_dropped_are_zero() -> None:
    query, key, value = tensors(*((2, 5, 8),) * 3)
    output = F.scaled_dot_product_attention(query, key, value, dropout_p=1.0)
    (grad,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    assert torch.autograd.grad(grad.sum(), key)[0].eq(0).all()


# ---- accuracy, function, errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
def test_float32_error_stays_below_two_millionths(is_causal: bool, isa: str) -> None:
    length = 261 if isa == "simt" else 777  # several blocks and a part of one; the simulator is slow
    inputs = tensors(*((1, 3, length, 64),) * 3, dtype=torch.float32)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    output, expected = (
        F.scaled_dot_product_attention(*inputs, is_causal=is_causal),
        reference(*exact, is_causal=is_causal),
    )
    grad = normal(*output.shape, seed=9, dtype=torch.float32)
    assert relative_error(output, expected) < 1e-6
    grads = torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_no_worse_than_torch(dtype: torch.dtype) -> None:
    inputs = tensors(*((2, 3, 200, 64),) * 3, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    grad = normal(2, 3, 200, 64, seed=9, dtype=dtype)
    errors = []
    expected = reference(*exact)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    for function in (F.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        output = function(*inputs)
        pairs = zip(torch.autograd.grad(output, inputs, grad), expected_grads, strict=True)
        errors.append([relative_error(output, expected), *(relative_error(g, e) for g, e in pairs)])
    assert all(ours <= theirs for ours, theirs in zip(*errors, strict=True)), errors


def test_the_python_function_computes_the_same() -> None:
    inputs = tensors(*((2, 5, 8),) * 3, dtype=torch.float32)
    output = AttentionFunction.apply(*inputs, None, 0.0, True, None, False)[0]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.equal(output, expected)
    grads = [torch.autograd.grad(o.square().sum(), inputs) for o in (output, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def _t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ERRORS = {
    "one_dimension": (RuntimeError, "at least 2 dimensional", (_t(3), _t(3), _t(3)), {}),
    "mixed_types": (RuntimeError, "same dtype", (_t(2, 3), _t(2, 3, dtype=torch.float64), _t(2, 3)), {}),
    "integers": (NotImplementedError, "query is Long", (_t(2, 3, dtype=torch.int64),) * 3, {}),
    "head_size": (RuntimeError, "same last dimension", (_t(2, 3), _t(2, 4), _t(2, 4)), {}),
    "key_length": (RuntimeError, "same sequence length", (_t(2, 3), _t(4, 3), _t(5, 3)), {}),
    "heads": (RuntimeError, "must match", (_t(4, 2, 3), _t(3, 2, 3), _t(3, 2, 3)), {}),
    "batches": (RuntimeError, "must match", (_t(4, 1, 2, 3), _t(3, 1, 2, 3), _t(3, 1, 2, 3)), {}),
    "mask_shape": (RuntimeError, "attn_mask of shape", (_t(2, 3), _t(4, 3), _t(4, 3)), {"attn_mask": _t(3, 4)}),
    "mask_too_deep": (RuntimeError, "attn_mask of shape", (_t(2, 3),) * 3, {"attn_mask": _t(1, 2, 2)}),
    "mask_grows": (RuntimeError, "attn_mask of shape", (_t(1, 2, 3),) * 3, {"attn_mask": _t(5, 2, 2)}),
    "mask_type": (RuntimeError, "attn_mask dtype", (_t(2, 3),) * 3, {"attn_mask": _t(2, 2, dtype=torch.int64)}),
    "mask_and_causal": (RuntimeError, "is_causal=True", (_t(2, 3),) * 3, {"attn_mask": _t(2, 2), "is_causal": True}),
    "dropout_high": (RuntimeError, "between 0 and 1", (_t(2, 3),) * 3, {"dropout_p": 1.5}),
    "dropout_negative": (RuntimeError, "between 0 and 1", (_t(2, 3),) * 3, {"dropout_p": -0.5}),
    "groups": (RuntimeError, "must divide", (_t(4, 2, 3), _t(3, 2, 3), _t(3, 2, 3)), {"enable_gqa": True}),
    "groups_without_heads": (IndexError, "out of range", (_t(2, 3),) * 3, {"enable_gqa": True}),
    "scale": (RuntimeError, "scale", (_t(2, 3),) * 3, {"scale": float("nan")}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_refused_by_name(name: str) -> None:
    error, message, inputs, kwargs = ERRORS[name]
    with pytest.raises(error, match=message):
        F.scaled_dot_product_attention(*inputs, **kwargs)


# ---- the module --------------------------------------------------------------------------------------------------

MODULE = next(info for info in module_db if info.module_cls is torch.nn.MultiheadAttention)


def pair(*args: Any, **kwargs: Any) -> tuple[nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours, theirs = nn.MultiheadAttention(*args, **kwargs), torch.nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_passes_torchs_samples(dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    samples = MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert len(samples) >= 32
    for sample in samples:
        made, given = sample.constructor_input, sample.forward_input
        ours, theirs = (m.to(dtype).train(training) for m in pair(*made.args, **made.kwargs))
        actual, expected = ours(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs)
        leaves = [t for t in given.args if t.requires_grad]
        results = []
        for module, (output, weights) in ((ours, actual), (theirs, expected)):
            grads = torch.autograd.grad(output.square().sum(), [*leaves, *module.parameters()], allow_unused=True)
            results.append([output, weights, *grads])
        assert [a is None for a in results[0]] == [e is None for e in results[1]], sample.desc
        pairs = [(a, e) for a, e in zip(*results, strict=True) if a is not None and e is not None]
        for a, e in pairs:
            assert a.shape == e.shape and a.dtype == e.dtype, sample.desc
            assert torch.equal(a.isnan(), e.isnan()), sample.desc
        ours_flat, theirs_flat = (
            torch.cat([t.flatten().double().nan_to_num() for t in ts]) for ts in zip(*pairs, strict=True)
        )
        assert relative_error(ours_flat, theirs_flat) < limit, sample.desc


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "padding", "attention", "both", "causal"])
def test_module_options(masked: str, batch_first: bool, average: bool) -> None:
    options = {"kdim": 5, "vdim": 7, "add_bias_kv": True, "add_zero_attn": True, "batch_first": batch_first}
    ours, theirs = (m.double() for m in pair(8, 4, **options))
    shapes = ((3, 6, 8), (3, 6, 5), (3, 6, 7)) if batch_first else ((6, 3, 8), (6, 3, 5), (6, 3, 7))
    inputs = tensors(*shapes)
    kwargs: dict[str, Any] = {"average_attn_weights": average}
    if masked in ("padding", "both"):
        kwargs["key_padding_mask"] = torch.zeros(3, 6, dtype=torch.bool).index_fill(1, torch.tensor([4, 5]), True)
    if masked in ("attention", "both"):
        kwargs["attn_mask"] = normal(12, 6, 6, seed=5, dtype=torch.float64) > 1
    if masked == "causal":
        kwargs |= {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True}
    for need_weights in (True, False):
        results = [m(*inputs, need_weights=need_weights, **kwargs) for m in (ours, theirs)]
        torch.testing.assert_close(*results)
        leaves = [r[0].sum() + (r[1].square().sum() if need_weights else 0) for r in results]
        torch.testing.assert_close(*(torch.autograd.grad(leaf, inputs) for leaf in leaves))


def test_module_weights_are_those_of_its_output_under_dropout() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.5, bias=False)
    x = normal(6, 3, 8, seed=1, dtype=torch.float32)
    output, weights = module(x, x, x, average_attn_weights=False)
    assert weights.eq(0).any()
    value = torch.nn.functional.linear(x, module.in_proj_weight[16:]).unflatten(-1, (2, 4)).permute(1, 2, 0, 3)
    combined = (weights @ value).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(output, module.out_proj(combined))


def test_module_copies_pickles_and_prints_as_torchs() -> None:
    ours, theirs = pair(8, 2)
    x = normal(6, 3, 8, seed=1, dtype=torch.float32)
    assert repr(ours) == repr(theirs)
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(clone) is nn.MultiheadAttention
        torch.testing.assert_close(clone(x, x, x), ours(x, x, x), rtol=0, atol=0)


def test_module_refuses_what_does_not_fit() -> None:
    module = nn.MultiheadAttention(8, 2)
    x = torch.zeros(6, 3, 8)
    with pytest.raises(RuntimeError, match="is_causal hint"):
        module(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="2D attn_mask"):
        module(x, x, x, attn_mask=torch.zeros(5, 6))
    with pytest.raises(AssertionError, match="embedding dimension of 8"):
        module(torch.zeros(6, 3, 4), x, x)
    nested = torch.nested.nested_tensor([torch.zeros(2, 8), torch.zeros(3, 8)], layout=torch.jagged)
    with pytest.raises(NotImplementedError, match="nested"):
        module(nested, nested, nested)
