"""Long short-term memory (Hochreiter & Schmidhuber 1997; forget gates: Gers et al. 2000; projection: Sak et al. 2014).

The kernels know one step (``lstm_cell``) and one layer in one direction (``lstm_layer``). Layers, directions, dropout
between layers and ``batch_first`` are composed of them here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor

from .. import _C
from .arguments import check_sequence_of_tensors, check_tensors, named, truth
from .registration import register_fake, traced_as
from .special_calls import elsewhere, torch_has_rules


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a long short-term memory; same arguments and results as ``torch.lstm_cell``.

    Args:
        input: ``[N, input_size]``; float32, float64, bfloat16 or float16.
        hx: hidden and cell state, both ``[N, hidden_size]``.
        w_ih, w_hh: ``[4 * hidden_size, input_size]`` and ``[4 * hidden_size, hidden_size]``, gates in the order input,
            forget, candidate, output.
        b_ih, b_hh: ``[4 * hidden_size]``, or None.

    Returns:
        The next hidden and cell state.

    Raises:
        RuntimeError: shapes, types or devices do not fit.

    Examples:
        >>> cell = torch.nn.LSTMCell(8, 16)
        >>> h, c = torch.zeros(4, 16), torch.zeros(4, 16)
        >>> h, c = lstm_cell(torch.randn(4, 8), (h, c), cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        >>> h.shape, c.shape
        (torch.Size([4, 16]), torch.Size([4, 16]))
    """
    if not isinstance(hx, (tuple, list)):
        check_sequence_of_tensors("lstm_cell", "hx", hx)
    if len(hx) != 2:
        raise RuntimeError(f"lstm_cell expects two hidden states, got {len(hx)}")
    if _C.is_special(input, *hx, w_ih, w_hh, b_ih, b_hh):
        parameters = (w_ih, w_hh, b_ih, b_hh)
        states = elsewhere("lstm", lstm_cell, _cell_by_torch, (input, *hx, *parameters), input, hx, *parameters)
        if states is not NotImplemented:
            return states
    arguments = (input, hx[0], hx[1], w_ih, w_hh, b_ih, b_hh)
    try:
        return _C.lstm_cell(*arguments)
    except TypeError as error:
        raise named(error, _C.lstm_cell, "input hx[0] hx[1] w_ih w_hh b_ih b_hh", arguments) from None


@overload
def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def lstm(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def lstm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory over sequences; same arguments and results as ``torch.lstm``.

    ``lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)`` takes a padded
    batch, ``lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)`` a packed one.

    Args:
        input: ``[T, N, input_size]``, or ``[N, T, input_size]`` with ``batch_first``.
        data, batch_sizes: the fields of a ``PackedSequence``: ``[rows, input_size]``, and the number of sequences of
            every step (int64, on the CPU, never growing).
        hx: initial hidden state ``[num_layers * directions, N, output_size]`` and cell state ``[..., hidden_size]``;
            ``output_size`` is ``proj_size`` with projections, else ``hidden_size``.
        params: for every layer and direction ``w_ih``, ``w_hh``, with biases ``b_ih``, ``b_hh``, with projections
            ``w_hr``; shapes as in ``torch.nn.LSTM``.
        dropout: probability of dropping an element of the output of every layer but the last, when ``train``.

    Returns:
        The output ``[T, N, directions * output_size]`` (or as the input is laid out), and the last states, shaped as
        ``hx``.

    Raises:
        TypeError: an argument is of a kind that has no meaning here.
        RuntimeError: the sequence is empty, or shapes, types or devices do not fit.

    Examples:
        >>> layers = torch.nn.LSTM(8, 16, num_layers=2, bidirectional=True)
        >>> state = torch.zeros(4, 3, 16), torch.zeros(4, 3, 16)
        >>> steps, parameters = torch.randn(5, 3, 8), list(layers.parameters())
        >>> output, h_n, c_n = lstm(steps, state, parameters, True, 2, 0.0, True, True, False)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([4, 3, 16]))
    """
    if len(arguments) != 9:
        raise TypeError(
            f"lstm() takes 9 positional arguments, got {len(arguments)}; expected input, hx, params, has_biases, "
            "num_layers, dropout, train, bidirectional, batch_first, or data, batch_sizes, hx, ... to bidirectional"
        )
    packed = isinstance(arguments[1], Tensor)
    hx, params = arguments[1 + packed : 3 + packed]
    for name, states in (("hx", hx), ("params", params)):
        if not isinstance(states, (tuple, list, Tensor)):
            check_sequence_of_tensors("lstm", name, states)
    if _C.is_special(*arguments[: 1 + packed], *hx, *params):
        result = elsewhere("lstm", lstm, _by_torch, (*arguments[: 1 + packed], *hx, *params), *arguments)
        if result is not NotImplemented:
            return result
    return _whole(_C.lstm_layer, *arguments)


def _by_torch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.lstm(*arguments) if torch_has_rules() else _whole(_composed_layer, *arguments)


def _cell_by_torch(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if torch_has_rules():
        return torch.lstm_cell(input, tuple(hx), w_ih, w_hh, b_ih, b_hh)
    h, c = hx
    return _composed_step(torch.nn.functional.linear(input, w_ih, b_ih), h, c, w_hh, b_hh)


def _whole(layer: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of ``lstm``, computed by ``layer``."""
    if isinstance(arguments[1], Tensor):
        data, batch_sizes, *rest = arguments
        return _stacked(layer, data, batch_sizes, *rest)
    input, *rest, batch_first = arguments
    if not isinstance(input, Tensor):
        check_tensors("lstm", input=input)
    if input.dim() != 3:
        raise RuntimeError(f"lstm: input must have 3 dimensions, got {input.dim()}: {list(input.shape)}")
    if not truth("lstm", "batch_first", batch_first):
        return _stacked(layer, input, None, *rest)
    output, h_n, c_n = _stacked(layer, input.transpose(0, 1), None, *rest)
    return output.transpose(0, 1), h_n, c_n


def _stacked(
    layer: Callable[..., Any],
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions, each by ``layer``, for input with time first."""
    if isinstance(num_layers, bool) or not isinstance(num_layers, (int, Integral)):
        raise TypeError(f"lstm: num_layers must be an int, got {type(num_layers).__name__}")
    check_tensors("lstm", input=input)
    check_sequence_of_tensors("lstm", "hx", hx)
    check_sequence_of_tensors("lstm", "params", params)
    has_biases, train = truth("lstm", "has_biases", has_biases), truth("lstm", "train", train)
    directions = 2 if truth("lstm", "bidirectional", bidirectional) else 1
    runs = num_layers * directions
    _check_stack(input, batch_sizes, hx, params, has_biases, num_layers, directions)
    per_run = len(params) // runs
    h_0, c_0 = hx[0].unbind(0), hx[1].unbind(0)
    h_n, c_n = [], []
    output = input
    for depth in range(num_layers):
        outputs = []
        for direction in range(directions):
            run = depth * directions + direction
            w_ih, w_hh, *others = params[run * per_run : (run + 1) * per_run]
            b_ih, b_hh = others[:2] if has_biases else (None, None)
            w_hr = others[-1] if per_run % 2 == 1 else None
            result = layer(output, h_0[run], c_0[run], w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, direction == 1)
            outputs.append(result[0])
            h_n.append(result[1])
            c_n.append(result[2])
        output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if train and dropout != 0.0 and depth + 1 < num_layers:
            output = torch.dropout(output, dropout, True)
    if runs == 1:
        return output, h_n[0].unsqueeze(0), c_n[0].unsqueeze(0)
    return output, torch.stack(h_n), torch.stack(c_n)


def _check_stack(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
) -> None:
    runs = num_layers * directions
    if len(hx) != 2:
        raise RuntimeError(f"lstm expects two hidden states, got {len(hx)}")
    if runs < 1:
        raise RuntimeError(f"lstm: num_layers must be at least 1, got {num_layers}")
    fewest = 4 if has_biases else 2
    if len(params) != runs * fewest and len(params) != runs * (fewest + 1):
        raise RuntimeError(
            f"lstm: got an incorrect number of RNN parameters: {len(params)}, expected {fewest}, or {fewest + 1} with "
            f"projections, for each of {runs} layers and directions"
        )
    if batch_sizes is None and input.shape[0] == 0:
        raise RuntimeError(f"lstm: Expected sequence length to be larger than 0 in RNN, got input {list(input.shape)}")
    for position, state in enumerate(hx):
        if state.dim() != 3 or state.shape[0] != runs:
            raise RuntimeError(
                f"lstm: Expected hidden[{position}] size ({runs}, batch, features), got {list(state.shape)}"
            )


def _composed_step(
    gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step in functions for which torch has all rules. ``gates`` are the input's part."""
    linear = torch.nn.functional.linear
    i, f, g, o = (gates + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else linear(h, w_hr)), c


def _composed_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``_C.lstm_layer``, step by step in functions for which torch has all rules."""
    gates = torch.nn.functional.linear(input, w_ih, b_ih)
    counts = [input.shape[1]] * input.shape[0] if batch_sizes is None else batch_sizes.tolist()
    parts = gates.unbind(0) if batch_sizes is None else gates.split(counts)
    steps = list(zip(parts, counts, strict=True))
    steps = steps[::-1] if reverse else steps
    h, c = (state[: steps[0][1]] for state in (h0, c0))  # of the sequences that have begun and not ended
    ended: list[tuple[Tensor, Tensor]] = []
    outputs = []
    for gates, count in steps:
        running = h.shape[0]
        if count < running:
            ended.insert(0, (h[count:], c[count:]))
            h, c = h[:count], c[:count]
        elif count > running:
            h, c = torch.cat([h, h0[running:count]]), torch.cat([c, c0[running:count]])
        h, c = _composed_step(gates, h, c, w_hh, b_hh, w_hr)
        outputs.append(h)
    outputs = outputs[::-1] if reverse else outputs
    h_n, c_n = zip((h, c), *ended, strict=True)
    output = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return output, torch.cat(h_n), torch.cat(c_n)


@traced_as(_C.lstm_cell)
def _traced_cell(
    input: Tensor, hx: Tensor, cx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    h, c, _ = torch.ops.dlkernels.lstm_cell.default(input, hx, cx, w_ih, w_hh, b_ih, b_hh)
    return h, c


@traced_as(_C.lstm_layer)
def _traced_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output, h_n, c_n, _, _ = torch.ops.dlkernels.lstm_layer.default(
        input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse
    )
    return output, h_n, c_n


def _accumulate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@register_fake("dlkernels::lstm_cell")
def _fake_cell(
    input: Tensor, hx: Tensor, cx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(hx.shape),
        input.new_empty(cx.shape),
        input.new_empty([input.shape[0], w_ih.shape[0]], dtype=_accumulate_type(input.dtype)),
    )


@register_fake("dlkernels::lstm_cell_backward")
def _fake_cell_backward(
    grad_h: Tensor,
    grad_c: Tensor,
    input: Tensor,
    hx: Tensor,
    cx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    shapes = [input.shape, hx.shape, cx.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1]]
    return tuple(input.new_empty(s) if wanted else None for s, wanted in zip(shapes, output_mask, strict=True))


@register_fake("dlkernels::lstm_layer", on_cpu=("batch_sizes",))
def _fake_layer(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    wide = _accumulate_type(input.dtype)
    return (
        input.new_empty([*input.shape[:-1], w_hh.shape[1]]),
        input.new_empty(h0.shape),
        input.new_empty(c0.shape),
        input.new_empty([rows, w_hh.shape[0]], dtype=wide),
        input.new_empty([rows, w_hh.shape[0] // 4], dtype=wide),
    )


@register_fake("dlkernels::lstm_layer_backward", on_cpu=("batch_sizes",))
def _fake_layer_backward(
    grad_output: Tensor,
    grad_h_n: Tensor,
    grad_c_n: Tensor,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    output: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    shapes = [input.shape, h0.shape, c0.shape, w_ih.shape, w_hh.shape, w_ih.shape[:1]]
    grads = [input.new_empty(s) if wanted else None for s, wanted in zip(shapes, output_mask[:6], strict=True)]
    return (*grads, input.new_empty(w_hr.shape) if w_hr is not None and output_mask[6] else None)


class LSTMCellFunction(torch.autograd.Function):
    """One step as a Python ``autograd.Function``: the same kernels, readable and composable with ``torch.func``.

    ``apply(input, hx, cx, w_ih, w_hh, b_ih, b_hh)`` returns ``(h, c, gates)``; ``gates`` is not differentiable.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.dlkernels.lstm_cell.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        gates = output[2]
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(*inputs, gates)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, grad_c: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wants = ctx.needs_input_grad
        mask = [*wants[:5], wants[5] or wants[6]]
        *grads, grad_bias = torch.ops.dlkernels.lstm_cell_backward.default(grad_h, grad_c, *ctx.saved_tensors, mask)
        return (*grads, grad_bias if wants[5] else None, grad_bias if wants[6] else None)


class LSTMLayerFunction(torch.autograd.Function):
    """One layer in one direction as a Python ``autograd.Function``: the same kernels, composable with ``torch.func``.

    ``apply(input, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, reverse)`` returns
    ``(output, h_n, c_n, gates, cells)``; the last two are not differentiable.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.dlkernels.lstm_layer.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reverse = inputs
        ctx.mark_non_differentiable(*output[3:])
        projected = tensors[7] is not None  # otherwise the output follows from the gates and cells
        ctx.save_for_backward(*tensors, output[0].clone() if projected else None, *output[3:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, output, gates, cells = ctx.saved_tensors
        wants = ctx.needs_input_grad
        mask = [*wants[:5], wants[5] or wants[6], wants[7]]
        *grads, grad_bias, grad_w_hr = torch.ops.dlkernels.lstm_layer_backward.default(
            *grad_outputs[:3], *inputs, ctx.reverse, output, gates, cells, mask
        )
        biases = (grad_bias if wants[5] else None, grad_bias if wants[6] else None)
        return (*grads, *biases, grad_w_hr, None, None)
