"""ONNX for models on our kernels: each of our operators in ONNX's own.

``torch.onnx.export(model.eval(), args, dynamo=True, custom_translation_table=dlkernels.onnx.translation_table())``

needs the libraries onnx and onnxscript. The translations serve inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op

_BOOL = 9  # of onnx.TensorProto

Value = Any  # of the graph that is being made, None where an argument is absent


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``: our forward operators in ONNX's.

    Batch norm on the statistics of a batch, dropout in attention, packed sequences and projections in LSTMs, and
    targets that are probabilities or smoothed make the export fail; a NotImplementedError among its causes says which.
    """
    ops = torch.ops.dlkernels
    return {
        ops.attention.default: _attention,
        ops.batch_norm.default: _batch_norm,
        ops.conv2d.default: _conv2d,
        ops.cross_entropy.default: _cross_entropy,
        ops.linear.default: _linear,
        ops.linear_cross_entropy.default: _linear_cross_entropy,
        ops.lstm_cell.default: _lstm_cell,
        ops.lstm_layer.default: _lstm_layer,
    }


def _refuse(refused: bool, what: str) -> None:
    if refused:
        raise NotImplementedError(f"dlkernels.onnx: {what} cannot be exported")


def _unused() -> Value:
    """Stands for an output that only backward reads."""
    return op.Constant(value_float=0.0)


def _filled_like(values: Value, fill: float) -> Value:
    return op.CastLike(op.Expand(op.Constant(value_float=fill), op.Shape(values)), values)


def _conv2d(
    input: Value,
    weight: Value,
    bias: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    top, bottom, left, right = padding
    return op.Conv(
        input, weight, bias, strides=stride, pads=[top, left, bottom, right], dilations=dilation, group=groups
    )


def _batch_norm(
    input: Value,
    weight: Value,
    bias: Value,
    residual: Value,
    running_mean: Value,
    running_var: Value,
    training: bool,
    eps: float,
    relu: bool,
) -> Value:
    _refuse(training, "batch norm on the statistics of a batch (call model.eval() first)")
    weight = _filled_like(running_mean, 1.0) if weight is None else weight
    bias = _filled_like(running_mean, 0.0) if bias is None else bias
    output = op.BatchNormalization(input, weight, bias, running_mean, running_var, epsilon=eps)
    output = output if residual is None else op.Add(output, residual)
    return op.Relu(output) if relu else output, _unused(), _unused()


def _linear(input: Value, weight: Value, bias: Value) -> Value:
    product = op.MatMul(input, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    _refuse(dropout_p > 0, "dropout in attention (call model.eval() first)")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    axes = list(range(len(key.shape)))
    if enable_gqa:
        key, value = (_repeated_heads(tensor, query) for tensor in (key, value))
    transposed = op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]])
    scale, hidden, zero = (op.CastLike(op.Constant(value_float=number), query) for number in (scale, -math.inf, 0.0))
    scores = op.Mul(op.MatMul(query, transposed), scale)
    if is_causal:
        ones = op.CastLike(op.Expand(op.Constant(value_float=1.0), op.Shape(scores, start=-2)), query)
        scores = op.Where(op.Cast(op.Trilu(ones, upper=0), to=_BOOL), scores, hidden)
    elif attn_mask is not None and attn_mask.dtype == _BOOL:
        scores = op.Where(attn_mask, scores, hidden)
    elif attn_mask is not None:
        scores = op.Add(scores, op.CastLike(attn_mask, scores))
    # A row that sees no key is zero: its maximum is -inf, where the softmax would be NaN.
    sees_nothing = op.Equal(op.ReduceMax(scores, [-1], keepdims=1), hidden)
    weights = op.Where(sees_nothing, zero, op.Softmax(scores, axis=-1))
    return op.MatMul(weights, value), _unused(), _unused(), _unused()


def _repeated_heads(tensor: Value, query: Value) -> Value:
    """[..., H_kv, S, E] to [..., H, S, E], each head as often as queries share it."""
    times = query.shape[-3] // tensor.shape[-3]
    groups = op.Unsqueeze(tensor, [-3])  # [..., H_kv, 1, S, E]
    ones = [1] * len(tensor.shape[:-2])
    repeated = op.Tile(groups, op.Constant(value_ints=[*ones, times, 1, 1]))
    shape = op.Concat(op.Shape(tensor, end=-3), op.Constant(value_ints=[-1]), op.Shape(tensor, start=-2), axis=0)
    return op.Reshape(repeated, shape)


def _gates_reordered(weight: Value) -> Value:
    """Gates in torch's order (input, forget, cell, output) to ONNX's (input, output, forget, cell)."""
    hidden = weight.shape[0] // 4
    rows = [gate * hidden + row for gate in (0, 3, 1, 2) for row in range(hidden)]
    return op.Gather(weight, op.Constant(value_ints=rows), axis=0)


def _lstm(
    input: Value, h0: Value, c0: Value, w_ih: Value, w_hh: Value, b_ih: Value, b_hh: Value, direction: str
) -> Value:
    """ONNX's LSTM of [T, N, features] from states [N, H]: outputs [T, N, H] and the last states."""
    biases = None
    if b_ih is not None:
        biases = op.Unsqueeze(op.Concat(_gates_reordered(b_ih), _gates_reordered(b_hh), axis=0), [0])
    output, h_n, c_n = op.LSTM(
        input,
        op.Unsqueeze(_gates_reordered(w_ih), [0]),
        op.Unsqueeze(_gates_reordered(w_hh), [0]),
        biases,
        None,
        op.Unsqueeze(h0, [0]),
        op.Unsqueeze(c0, [0]),
        direction=direction,
        hidden_size=w_hh.shape[1],
    )
    return op.Squeeze(output, [1]), op.Squeeze(h_n, [0]), op.Squeeze(c_n, [0])


def _lstm_cell(input: Value, hx: Value, cx: Value, w_ih: Value, w_hh: Value, b_ih: Value, b_hh: Value) -> Value:
    _, h, c = _lstm(op.Unsqueeze(input, [0]), hx, cx, w_ih, w_hh, b_ih, b_hh, "forward")
    return h, c, _unused()


def _lstm_layer(
    input: Value,
    h0: Value,
    c0: Value,
    w_ih: Value,
    w_hh: Value,
    b_ih: Value,
    b_hh: Value,
    w_hr: Value,
    batch_sizes: Value,
    reverse: bool,
) -> Value:
    _refuse(w_hr is not None, "an LSTM with projections")
    _refuse(batch_sizes is not None, "an LSTM over packed sequences")
    outputs = _lstm(input, h0, c0, w_ih, w_hh, b_ih, b_hh, "reverse" if reverse else "forward")
    return *outputs, _unused(), _unused()


def _cross_entropy(
    logits: Value, target: Value, weight: Value, reduction: int, ignore_index: int, label_smoothing: float
) -> Value:
    _refuse(target.dtype.is_floating_point(), "cross-entropy with probabilities as targets")
    _refuse(label_smoothing > 0, "cross-entropy with smoothed labels")
    loss, _ = op.SoftmaxCrossEntropyLoss(
        logits, target, weight, ignore_index=ignore_index, reduction=("none", "mean", "sum")[reduction]
    )
    return loss, _unused(), _unused()


def _linear_cross_entropy(
    input: Value,
    linear_weight: Value,
    linear_bias: Value,
    target: Value,
    weight: Value,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    wide_loss: bool,
) -> Value:
    logits = _linear(input, linear_weight, linear_bias)
    return _cross_entropy(logits, target, weight, reduction, ignore_index, label_smoothing)
