"""Scaled dot-product attention (Vaswani et al., "Attention is all you need", 2017; computed as in Dao et al., 2022)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import _C
from .arguments import named
from .registration import register_fake, traced_as
from .special_calls import elsewhere, torch_has_rules


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale query key^T + attn_mask) value``, as ``torch.nn.functional.scaled_dot_product_attention``.

    The matrix of scores is never stored, forward or backward.

    Args:
        query: ``[..., H, L, E]``; float32, float64, bfloat16 or float16. Contiguous in
            the last dimension, or a copy is made.
        key: ``[..., H, S, E]``, or ``[..., H_kv, S, E]`` with ``enable_gqa``.
        value: ``[..., H, S, E_v]``, or ``[..., H_kv, S, E_v]`` with ``enable_gqa``. Leading dimensions broadcast.
        attn_mask: broadcast to ``[..., H, L, S]`` without being expanded in memory. Boolean: ``False`` hides a key.
            Floating (float32 or the type of ``query``): added to the scores; differentiable.
        dropout_p: probability, in ``[0, 1]``, that a weight is zeroed; applied whenever it is positive. The seed comes
            from torch's CPU generator, so ``torch.manual_seed`` repeats a run.
        is_causal: query ``i`` sees keys ``0`` to ``i``. Excludes ``attn_mask``.
        scale: of the scores; ``1 / sqrt(E)`` by default.
        enable_gqa: ``H / H_kv`` consecutive query heads share a key and value head (Ainslie et al., 2023).

    Returns:
        ``[..., H, L, E_v]``. A query that sees no key gives zeros. Where the heads of ``query`` lie inside its rows
        (``[..., L, H, E]`` in memory) so do those of the result.

    Raises:
        RuntimeError: shapes, types or options that do not fit.
        IndexError: ``enable_gqa`` without a dimension of heads.
        NotImplementedError: an element type that is not supported.

    Examples:
        >>> query, key, value = (torch.randn(2, 8, 128, 64) for _ in range(3))
        >>> output = scaled_dot_product_attention(query, key, value, is_causal=True)
        >>> output.shape
        torch.Size([2, 8, 128, 64])
        >>> torch.allclose(output[:, :, 0], value[:, :, 0])  # the first query sees the first key alone
        True
    """
    if _C.is_special(query, key, value, attn_mask):
        tensors = (query, key, value, attn_mask)
        output = elsewhere(
            *("attention", scaled_dot_product_attention, _by_torch, tensors),
            *(*tensors, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        if output is not NotImplemented:
            return output
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    try:
        return _C.attention(*arguments)
    except TypeError as error:
        names = "query key value attn_mask dropout_p is_causal scale enable_gqa"
        raise named(error, _C.attention, names, arguments) from None


def _by_torch(*arguments: Any, **keywords: Any) -> Tensor:
    if torch_has_rules():
        return torch.nn.functional.scaled_dot_product_attention(*arguments, **keywords)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*arguments, **keywords)


@traced_as(_C.attention)
def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    outputs = torch.ops.dlkernels.attention.default(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    return outputs[0]


def _with_heads(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor


def _broadcast_shapes(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[list[int], list[int], list[int]]:
    """The batch shape, and the head counts (one-element lists) of query and of key and value, all broadcast."""
    batch = list(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    if enable_gqa:
        kv_heads = key.shape[-3] if key.shape[-3] == value.shape[-3] else query.shape[-3]
        return batch, [query.shape[-3]], [kv_heads]
    kv_shape = torch.broadcast_shapes(key.shape[-3:-2], value.shape[-3:-2])
    return batch, list(torch.broadcast_shapes(query.shape[-3:-2], kv_shape)), list(kv_shape)


def _empty_like_layout(like: Tensor, batch: list[int], heads: list[int], rows: int, columns: int) -> Tensor:
    """As the kernel allocates: heads inside rows where ``like``, broadcast, has them there."""
    strides = like.expand([*batch, *heads, like.shape[-2], like.shape[-1]]).stride()
    if strides[-3] >= strides[-2]:
        return like.new_empty([*batch, *heads, rows, columns])
    return like.new_empty([*batch, rows, *heads, columns]).transpose(-3, -2)


def _contiguous_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


@register_fake("dlkernels::attention")
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_heads = max(query.dim(), key.dim(), value.dim()) > 2
    q, k, v = (_contiguous_columns(_with_heads(t)) for t in (query, key, value))
    batch, heads, _ = _broadcast_shapes(q, k, v, enable_gqa)
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = _empty_like_layout(q, batch, heads, q.shape[-2], v.shape[-1])
    statistics = query.new_empty([2, *batch, *heads, q.shape[-2]], dtype=accumulate)
    if not has_heads:
        output, statistics = output.squeeze(0), statistics.squeeze(1)
    exact_output = torch.empty_like(output, dtype=accumulate) if accumulate != query.dtype else query.new_empty([0])
    return output, exact_output, statistics, query.new_empty([], dtype=torch.int64)


def _reduced_to(grad: Tensor, argument: Tensor) -> Tensor:
    if grad.shape == argument.shape:
        return grad
    if argument.dim() >= 3 and argument.shape[-3] > 1 and grad.shape[-3] != argument.shape[-3]:
        heads = argument.shape[-3]
        return _reduced_to(grad.contiguous().unflatten(-3, (heads, grad.shape[-3] // heads)).sum(-3), argument)
    return grad.contiguous().sum_to_size(argument.shape)


@register_fake("dlkernels::attention_backward")
def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    output: Tensor,
    exact_output: Tensor,
    statistics: Tensor,
    dropout_seed: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    q, k, v = (_contiguous_columns(_with_heads(t)) for t in (query, key, value))
    batch, heads, kv_heads = _broadcast_shapes(q, k, v, enable_gqa)
    shapes = [[*batch, *count, *t.shape[-2:]] for t, count in ((q, heads), (k, kv_heads), (v, kv_heads))]
    summed = any(math.prod(shape) != t.numel() for shape, t in zip(shapes, (q, k, v), strict=True))
    if summed and query.dtype in (torch.bfloat16, torch.float16):  # computed in float32 and rounded after the sums
        q, k, v = (_contiguous_columns(_with_heads(t.to(torch.float32))) for t in (query, key, value))
    if enable_gqa and k.shape[-3] != v.shape[-3]:
        k, v = (t.repeat_interleave(heads[0] // t.shape[-3], -3) if t.shape[-3] != heads[0] else t for t in (k, v))
    grads: list[Tensor | None] = []
    for wanted, argument, view, count in zip(
        output_mask, (query, key, value), (q, k, v), (heads, kv_heads, kv_heads), strict=False
    ):
        grad = _empty_like_layout(view, batch, count, view.shape[-2], view.shape[-1]) if wanted else None
        grads.append(None if grad is None else _reduced_to(grad, argument).to(query.dtype))
    wants_mask = output_mask[3] and attn_mask is not None and attn_mask.dtype != torch.bool
    grad_mask = attn_mask.new_empty(attn_mask.shape) if wants_mask and attn_mask is not None else None
    return grads[0], grads[1], grads[2], grad_mask


class AttentionFunction(torch.autograd.Function):
    """Attention as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)`` returns
    ``(output, exact_output, statistics, dropout_seed)``; only ``output`` is differentiable.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.dlkernels.attention.default(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        query, key, value, attn_mask, *ctx.options = inputs
        attention, exact_output, statistics, dropout_seed = output
        ctx.mark_non_differentiable(exact_output, statistics, dropout_seed)
        ctx.save_for_backward(query, key, value, attn_mask, attention, exact_output, statistics, dropout_seed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = torch.ops.dlkernels.attention_backward.default(
            grad_output, *ctx.saved_tensors, *ctx.options, list(ctx.needs_input_grad[:4])
        )
        return (*grads, None, None, None, None)
