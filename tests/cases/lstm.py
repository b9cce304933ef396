"""Calls of lstm_cell and lstm for the shared suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlkernels import functional as F
from dlkernels import nn

from . import Case, Sample, normal

PACKED = (4, 4, 2, 1)


def cell_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with hidden and cell state among its flat arguments."""

    def call(input: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> Any:
        return function(input, (h, c), *parameters)

    return call


def sequence_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, spelled as ``torch.lstm``, with states and parameters among its flat arguments."""

    def call(
        input: Tensor,
        h: Tensor,
        c: Tensor,
        *parameters: Tensor,
        bias: bool = True,
        layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        batch_sizes: Tensor | None = None,
    ) -> Any:
        training = input.is_cuda  # without dropout it changes nothing, but cuDNN differentiates in training alone
        if batch_sizes is not None:
            return function(input, batch_sizes, (h, c), parameters, bias, layers, 0.0, training, bidirectional)
        return function(input, (h, c), parameters, bias, layers, 0.0, training, bidirectional, batch_first)

    return call


def _parameters(inputs: int, hidden: int, projection: int, bias: bool, seed: int) -> list[Tensor]:
    outputs = projection or hidden
    shapes = [(4 * hidden, inputs), (4 * hidden, outputs)]
    shapes += [(4 * hidden,), (4 * hidden,)] if bias else []
    shapes += [(projection, hidden)] if projection else []
    scale = hidden**-0.5
    return [scale * normal(*s, seed=seed + i, dtype=torch.float64) for i, s in enumerate(shapes)]


def _cell(batch: int, inputs: int, hidden: int, bias: bool = True) -> Callable[[torch.dtype], Sample]:
    def build(dtype: torch.dtype) -> Sample:
        states = [normal(batch, hidden, seed=2 + i, dtype=torch.float64) for i in range(2)]
        tensors = [normal(batch, inputs, seed=1, dtype=torch.float64), *states]
        tensors += _parameters(inputs, hidden, 0, bias, seed=4)
        return Sample(tuple(t.to(dtype) for t in tensors))

    return build


def _sequence(
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    layers: int = 1,
    bidirectional: bool = False,
    projection: int = 0,
    bias: bool = True,
    batch_first: bool = False,
    batch_sizes: tuple[int, ...] | None = None,
) -> Callable[[torch.dtype], Sample]:
    directions = 2 if bidirectional else 1
    outputs = projection or hidden

    def build(dtype: torch.dtype) -> Sample:
        options: dict[str, Any] = {"bias": bias, "layers": layers, "bidirectional": bidirectional}
        if batch_sizes is not None:
            shape = [sum(batch_sizes), inputs]
            options["batch_sizes"] = torch.tensor(batch_sizes)
        else:
            shape = [batch, steps, inputs] if batch_first else [steps, batch, inputs]
            options["batch_first"] = batch_first
        tensors = [normal(*shape, seed=1, dtype=torch.float64)]
        tensors += [normal(layers * directions, batch, n, seed=n, dtype=torch.float64) for n in (outputs, hidden)]
        for layer in range(layers):
            for direction in range(directions):
                size = inputs if layer == 0 else directions * outputs
                tensors += _parameters(size, hidden, projection, bias, seed=100 * layer + 10 * direction + 20)
        return Sample(tuple(t.to(dtype) for t in tensors), options)

    return build


def _cell_case(name: str, build: Callable[[torch.dtype], Sample], primary: bool = False) -> Case:
    functions = cell_of(F.lstm_cell), cell_of(torch._VF.lstm_cell)
    return Case("lstm", f"cell_{name}", *functions, build, primary=primary, integers=False)


def _case(name: str, build: Callable[[torch.dtype], Sample], primary: bool = False) -> Case:
    functions = sequence_of(F.lstm), sequence_of(torch._VF.lstm)
    return Case("lstm", name, *functions, build, primary=primary, integers=False)


CASES = [
    _cell_case("small", _cell(5, 7, 6), primary=True),
    _cell_case("few_rows", _cell(7, 33, 40)),
    _cell_case("many_rows", _cell(71, 20, 19, bias=False)),
    _case("one_layer", _sequence(4, 3, 5, 6), primary=True),
    _case("one_step", _sequence(1, 3, 5, 6)),
    _case("many_rows", _sequence(6, 13, 10, 21)),
    _case("wide_batch", _sequence(3, 53, 4, 35, bias=False)),
    _case("two_layers_both_ways", _sequence(5, 2, 3, 4, layers=2, bidirectional=True, batch_first=True)),
    _case("deep", _sequence(2, 17, 5, 270)),
    _case("deep_projection", _sequence(2, 17, 4, 261, projection=9, bias=False)),
    _case("projection", _sequence(4, 3, 5, 7, projection=3)),
    _case("projection_both_ways", _sequence(5, 14, 4, 9, projection=5, layers=2, bidirectional=True, bias=False)),
    _case("packed", _sequence(4, 4, 3, 5, layers=2, bidirectional=True, batch_sizes=PACKED)),
    _case("packed_projection", _sequence(4, 4, 3, 6, projection=2, bidirectional=True, batch_sizes=PACKED)),
    _case("packed_many_rows", _sequence(3, 40, 6, 18, bidirectional=True, batch_sizes=(40, 23, 3))),
]


def _leaves(build: Callable[[torch.dtype], Sample]) -> list[Tensor]:
    return list(build(torch.float32).requiring_grad().args)


def _grads(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*s, seed=50 + i, dtype=torch.float32).requires_grad_() for i, s in enumerate(shapes)]


def _cell_arguments() -> tuple[Any, ...]:
    return tuple(_leaves(_cell(3, 4, 5)))


def _cell_backward_arguments() -> tuple[Any, ...]:
    leaves = _cell_arguments()
    gates = torch.ops.dlkernels.lstm_cell(*(t.detach() for t in leaves))[2]
    return (*_grads((3, 5), (3, 5)), *leaves, gates, [True, True, True, True, True, True])


def _layer_arguments(packed: bool = True) -> tuple[Any, ...]:
    batch_sizes = PACKED if packed else None
    input, h, c, *parameters = _leaves(_sequence(3, 4, 3, 6, projection=2, batch_sizes=batch_sizes))
    return (input, h[0], c[0], *parameters, torch.tensor(PACKED) if packed else None, True)


def _layer_backward_arguments() -> tuple[Any, ...]:
    *tensors, batch_sizes, reverse = _layer_arguments(packed=False)
    results = torch.ops.dlkernels.lstm_layer(*(t.detach() for t in tensors), batch_sizes, reverse)
    saved = (results[0], *results[3:])
    grads = _grads((3, 4, 2), (4, 2), (4, 6))
    return (*grads, *tensors, batch_sizes, reverse, *saved, [True, False, True, True, True, True, True])


OPERATOR_SAMPLES = [
    ("lstm_cell", _cell_arguments),
    ("lstm_cell_backward", _cell_backward_arguments),
    ("lstm_layer", _layer_arguments),
    ("lstm_layer_backward", _layer_backward_arguments),
]

OPINFO: list[Any] = []

MODULEINFO = [("nn.LSTM", nn.LSTM), ("nn.LSTMCell", nn.LSTMCell)]
