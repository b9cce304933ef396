"""The linear layers of a vision Transformer, a language model and small classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .harness import Case, Cost, Problem


@dataclass(frozen=True)
class Shape:
    """Rows, input and output features."""

    name: str
    rows: int
    inputs: int
    outputs: int


# Class, shapes; the first shape of each is the one that a quick run measures.
GROUPS: tuple[tuple[str, tuple[Shape, ...]], ...] = (
    (
        "linear",
        (
            Shape("ViT-S/16 MLP in", 788, 384, 1536),
            Shape("ViT-S/16 MLP out", 788, 1536, 384),
            Shape("ViT-S/16 projections", 788, 384, 1152),
            Shape("GPT-2 MLP in", 256, 768, 3072),
            Shape("GPT-2 MLP out", 256, 3072, 768),
            Shape("GPT-2 projections", 256, 768, 2304),
            Shape("MLP on CIFAR-10", 128, 3072, 512),
        ),
    ),
    (
        "linear, small",
        (
            Shape("GPT-2 MLP, one token", 1, 768, 3072),
            Shape("digits classifier", 64, 64, 10),
            Shape("16 features", 16, 16, 16),
        ),
    ),
)


GPU_GROUPS: tuple[tuple[str, tuple[Shape, ...]], ...] = (
    (
        "linear",
        (
            Shape("GPT-2 MLP in", 16_384, 768, 3072),
            Shape("GPT-2 MLP out", 16_384, 3072, 768),
            Shape("square", 8192, 8192, 8192),
            Shape("square, small", 2048, 2048, 2048),
        ),
    ),
    ("linear, small", (Shape("GPT-2 MLP, one token", 1, 768, 3072), Shape("digits classifier", 64, 64, 10))),
)


def problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random rows, weights and biases."""
    generator = torch.Generator(device).manual_seed(0)
    scale = shape.inputs**-0.5
    sizes = ((shape.rows, shape.inputs), (shape.outputs, shape.inputs), (shape.outputs,))
    tensors = [torch.randn(size, generator=generator, device=device) for size in sizes]
    leaves = [(t if i == 0 else t * scale).to(dtype).requires_grad_() for i, t in enumerate(tensors)]

    def ours(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(input, weight, bias)

    def peer(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, weight, bias)

    return Problem(tuple(leaves), ours, peer)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """Every shape in every type; only the first shape of a class for a quick run."""
    for group, shapes in GPU_GROUPS if gpu else GROUPS:
        for dtype in dtypes:
            if dtype == torch.float16:
                continue
            for shape in shapes[:1] if quick else shapes:
                elements = shape.rows * shape.inputs + shape.inputs * shape.outputs + shape.rows * shape.outputs
                operations = 2 * shape.rows * shape.inputs * shape.outputs
                yield Case(
                    "linear",
                    group,
                    f"{shape.name} ({shape.rows}x{shape.inputs} to {shape.outputs})",
                    dtype,
                    partial(problem, shape, dtype),
                    Cost(dtype.itemsize * elements, operations),
                    Cost(3 * dtype.itemsize * elements, 3 * operations),
                )
