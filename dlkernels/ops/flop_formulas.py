"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for our operators: what it counts for torch's, or for the
matrix products that torch makes of the same call. Imported together with that module."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils import flop_counter
from torch.utils.flop_counter import register_flop_formula

_OPS = torch.ops.dlkernels
Shape = Sequence[int]


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


@register_flop_formula(_OPS.conv2d)
def _conv2d(input: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return int(flop_counter.conv_flop_count(list(input), list(weight), list(out_shape)))


@register_flop_formula(_OPS.conv2d_backward)
def _conv2d_backward(
    grad_output: Shape,
    input: Shape,
    weight: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    output_mask: Sequence[bool],
    *,
    out_shape: Sequence[Shape],
    **_: Any,
) -> int:
    # No bias, not transposed. The wrapper of torch's formula takes shapes or tensors, which its type does not say.
    rest: tuple[Any, ...] = (None, stride, padding, dilation, False, [0, 0], groups, output_mask)
    formula: Any = flop_counter.conv_backward_flop
    return int(formula(grad_output, input, weight, *rest, out_val=out_shape))


@register_flop_formula(_OPS.linear)
def _linear(input: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _product(prod(input[:-1]), *reversed(weight))


@register_flop_formula(_OPS.linear_backward)
def _linear_backward(grad_output: Shape, input: Shape, weight: Shape, output_mask: Sequence[bool], **_: Any) -> int:
    return sum(output_mask[:2]) * _linear(input, weight)


@register_flop_formula(_OPS.linear_cross_entropy)
def _linear_cross_entropy(input: Shape, linear_weight: Shape, *_: Any, **__: Any) -> int:
    return _linear(input, linear_weight)


@register_flop_formula(_OPS.linear_cross_entropy_backward)
def _linear_cross_entropy_backward(grad_loss: Shape, input: Shape, linear_weight: Shape, *rest: Any, **_: Any) -> int:
    output_mask = rest[-1]  # the logits, which are computed again, are not counted
    return sum(output_mask[:2]) * _linear(input, linear_weight)


def _scores(query: Shape, key: Shape, value: Shape, output: Shape) -> tuple[int, int, int, int, int]:
    """Heads of the whole batch, queries, keys, and the features of keys and values."""
    return prod(output[:-2]), query[-2], key[-2], query[-1], value[-1]


@register_flop_formula(_OPS.attention)
def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    heads, queries, keys, features, value_features = _scores(query, key, value, out_shape[0])
    return heads * _product(queries, features + value_features, keys)


@register_flop_formula(_OPS.attention_backward)
def _attention_backward(
    grad_output: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    attn_mask: Shape | None,
    output: Shape,
    *_: Any,
    **__: Any,
) -> int:
    """The scores again, and a product for each of the gradients of weights, value, query and key."""
    heads, queries, keys, features, value_features = _scores(query, key, value, output)
    return heads * _product(queries, 3 * features + 2 * value_features, keys)


def _gates(rows: int, w_ih: Shape, w_hh: Shape, w_hr: Shape | None = None) -> tuple[int, int, int]:
    """The products of ``rows`` steps with the input, with the hidden state, and that of the projection."""
    projection = 0 if w_hr is None else _product(rows, *w_hr)
    return _product(rows, *w_ih), _product(rows, *w_hh), projection


@register_flop_formula(_OPS.lstm_cell)
def _lstm_cell(input: Shape, hx: Shape, cx: Shape, w_ih: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
    return sum(_gates(input[0], w_ih, w_hh))


@register_flop_formula(_OPS.lstm_cell_backward)
def _lstm_cell_backward(
    grad_h: Shape, grad_c: Shape, input: Shape, hx: Shape, cx: Shape, w_ih: Shape, w_hh: Shape, *rest: Any, **_: Any
) -> int:
    wants_input, wants_hx, wants_w_ih, wants_w_hh = (rest[-1][i] for i in (0, 1, 3, 4))
    with_input, with_hidden = _gates(input[0], w_ih, w_hh)[:2]
    return (wants_input + wants_w_ih) * with_input + (wants_hx + wants_w_hh) * with_hidden


@register_flop_formula(_OPS.lstm_layer)
def _lstm_layer(
    input: Shape,
    h0: Shape,
    c0: Shape,
    w_ih: Shape,
    w_hh: Shape,
    b_ih: Shape | None,
    b_hh: Shape | None,
    w_hr: Shape | None,
    *_: Any,
    **__: Any,
) -> int:
    return sum(_gates(prod(input[:-1]), w_ih, w_hh, w_hr))


@register_flop_formula(_OPS.lstm_layer_backward)
def _lstm_layer_backward(
    grad_output: Shape,
    grad_h_n: Shape,
    grad_c_n: Shape,
    input: Shape,
    h0: Shape,
    c0: Shape,
    w_ih: Shape,
    w_hh: Shape,
    b_ih: Shape | None,
    b_hh: Shape | None,
    w_hr: Shape | None,
    *rest: Any,
    **_: Any,
) -> int:
    wants_input, wants_h0, wants_w_ih, wants_w_hh, wants_w_hr = (rest[-1][i] for i in (0, 1, 3, 4, 6))
    rows = prod(input[:-1])
    with_input, with_hidden, projection = _gates(rows, w_ih, w_hh, w_hr)
    first_steps = 0 if wants_h0 else h0[0]  # whose gradient goes no further back
    through_time = _product(rows - first_steps, *w_hh)
    return (
        (wants_input + wants_w_ih) * with_input
        + wants_w_hh * with_hidden
        + through_time
        + (1 + wants_w_hr) * projection
    )
