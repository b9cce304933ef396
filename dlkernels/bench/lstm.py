"""Character and word LSTMs (Karpathy 2015; Zaremba et al. 2014), and the single step of a captioning decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import nn
from .harness import Case, Cost, Problem


@dataclass(frozen=True)
class Shape:
    """Steps, batch, input size, hidden size, layers. One step stands for the cell."""

    name: str
    steps: int
    batch: int
    input: int
    hidden: int
    layers: int = 1


# Class, element types, shapes; the first shape of each is the one that a quick run measures.
GROUPS: tuple[tuple[str, tuple[str, ...], tuple[Shape, ...]], ...] = (
    (
        "LSTM H 128-512",
        ("float32", "bfloat16"),
        (
            Shape("char-LSTM", 64, 32, 128, 128),
            Shape("char-LSTM, two layers", 64, 32, 65, 256, 2),
            Shape("word-LSTM", 35, 20, 512, 512),
        ),
    ),
    (
        "LSTM batch 1",
        ("float32",),
        (Shape("char-LSTM", 64, 1, 128, 128), Shape("char-LSTM", 64, 1, 256, 256), Shape("word-LSTM", 35, 1, 512, 512)),
    ),
)
CELLS: tuple[tuple[str, tuple[str, ...], tuple[Shape, ...]], ...] = (
    (
        "LSTMCell",
        ("float32",),
        (
            Shape("captioning", 1, 25, 256, 512),
            Shape("sampling", 1, 1, 128, 128),
            Shape("decoder", 1, 64, 512, 512),
        ),
    ),
)


GPU_GROUPS: tuple[tuple[str, tuple[str, ...], tuple[Shape, ...]], ...] = (
    (
        "LSTM H 256-1024",
        ("float32", "bfloat16", "float16"),
        (
            Shape("word-LSTM", 64, 64, 512, 512),
            Shape("char-LSTM", 128, 64, 256, 256),
            Shape("wide", 64, 64, 1024, 1024),
            Shape("char-LSTM, two layers", 128, 64, 256, 256, 2),
        ),
    ),
    ("LSTM batch 1", ("float32",), (Shape("char-LSTM", 128, 1, 256, 256), Shape("word-LSTM", 64, 1, 512, 512))),
)


def sequence_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """A layer or stack with the same random weights for both."""
    torch.manual_seed(0)
    peer_module = torch.nn.LSTM(shape.input, shape.hidden, shape.layers).to(device, dtype)
    our_module = nn.LSTM(shape.input, shape.hidden, shape.layers).to(device, dtype)
    our_module._parameters = peer_module._parameters  # shared, so that one list of leaves serves both
    our_module._init_flat_weights()
    sequence = torch.randn(shape.steps, shape.batch, shape.input).to(device, dtype).requires_grad_()

    def ours(sequence: Tensor, *_: Tensor) -> Tensor:
        return our_module(sequence)[0]

    def peer(sequence: Tensor, *_: Tensor) -> Tensor:
        return peer_module(sequence)[0]

    return Problem((sequence, *peer_module.parameters()), ours, peer)


def cell_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """One step from a random state."""
    torch.manual_seed(0)
    peer_module = torch.nn.LSTMCell(shape.input, shape.hidden).to(device, dtype)
    our_module = nn.LSTMCell(shape.input, shape.hidden).to(device, dtype)
    our_module._parameters = peer_module._parameters
    sizes = (shape.input, shape.hidden, shape.hidden)
    step, hidden, cell = (torch.randn(shape.batch, size).to(device, dtype).requires_grad_() for size in sizes)

    def ours(step: Tensor, hidden: Tensor, cell: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return our_module(step, (hidden, cell))

    def peer(step: Tensor, hidden: Tensor, cell: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return peer_module(step, (hidden, cell))

    return Problem((step, hidden, cell, *peer_module.parameters()), ours, peer)


def cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    """Four gates: an input and a recurrent product each; backward does both twice. The weights move once."""
    operations, weights, states = 0, 0, 0
    for layer in range(shape.layers):
        inputs = shape.input if layer == 0 else shape.hidden
        layer_weights = 4 * shape.hidden * (inputs + shape.hidden)
        operations += 2 * shape.steps * shape.batch * layer_weights
        weights += layer_weights
        states += shape.steps * shape.batch * (inputs + shape.hidden)
    moved = element_size * (weights + states)
    return Cost(moved, operations), Cost(3 * moved, 3 * operations)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """Sequences, then single steps; only the first shape of a class for a quick run."""
    for groups, build in ((GPU_GROUPS if gpu else GROUPS, sequence_problem), (CELLS, cell_problem)):
        for group, group_dtypes, shapes in groups:
            for dtype in dtypes:
                if str(dtype).removeprefix("torch.") not in group_dtypes:
                    continue
                for shape in shapes[:1] if quick else shapes:
                    sizes = f"T={shape.steps} N={shape.batch} I={shape.input} H={shape.hidden}"
                    yield Case(
                        "lstm",
                        group,
                        f"{shape.name} ({sizes})",
                        dtype,
                        partial(build, shape, dtype),
                        *cost(shape, dtype.itemsize),
                    )
