"""Training-mode batch norms of ResNet-50 and MobileNetV2, alone and with the ReLU and the sum that follow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .harness import Case, Cost, Problem

# Name, [N, C, H, W]; a quick run takes the first.
SHAPES = (
    ("ResNet-50 layer2", (8, 128, 28, 28)),
    ("ResNet-50 stem", (4, 64, 112, 112)),
    ("ResNet-50 layer1", (8, 256, 56, 56)),
    ("ResNet-50 layer4", (8, 512, 7, 7)),
    ("MobileNetV2 block 4", (8, 192, 28, 28)),
)
GPU_SHAPES = (
    ("ResNet-50 layer2", (256, 128, 28, 28)),
    ("ResNet-50 layer1", (256, 64, 56, 56)),
    ("ResNet-50 layer1", (256, 256, 56, 56)),
    ("ResNet-50 layer3", (256, 1024, 14, 14)),
    ("ResNet-50 layer4", (256, 512, 7, 7)),
)
# Class, layouts, element types, whether ReLU follows, whether a residual is added before it.
Group = tuple[str, tuple[str, ...], tuple[str, ...], bool, bool]
GROUPS: tuple[Group, ...] = (
    ("train", ("contiguous", "channels_last"), ("float32", "bfloat16"), False, False),
    ("train + ReLU", ("contiguous", "channels_last"), ("float32",), True, False),
    ("train + residual + ReLU", ("contiguous", "channels_last"), ("float32",), True, True),
)


GPU_GROUPS: tuple[Group, ...] = tuple(
    (name, layouts, ("float32", "bfloat16"), relu, residual) for name, layouts, _, relu, residual in GROUPS
)


def problem(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, relu: bool, residual: bool, device: torch.device
) -> Problem:
    """Random activations; the running statistics are updated as in training, each contender's own.

    The activations stay so far from zero, with the sign of the residual, that no rounding moves an output across it,
    where the gradient of a ReLU jumps.
    """
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    channels = shape[1]

    signs = torch.randn(shape, generator=generator, device=device)

    def activations() -> Tensor:
        magnitudes = 1 + torch.rand(shape, generator=generator, device=device)
        return magnitudes.copysign(signs).to(dtype).to(memory_format=memory_format).requires_grad_()

    weight = (1 + 0.1 * torch.rand(channels, generator=generator, device=device)).to(dtype).requires_grad_()
    bias = (0.1 * torch.rand(channels, generator=generator, device=device)).to(dtype).requires_grad_()
    zeros, ones = torch.zeros(channels, dtype=dtype, device=device), torch.ones(channels, dtype=dtype, device=device)
    our_statistics, peer_statistics = (zeros, ones), (zeros.clone(), ones.clone())

    def ours(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        activation = "relu" if relu else None
        return functional.batch_norm(
            input, *our_statistics, weight, bias, training=True, activation=activation, residual=residual
        )

    def peer(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = torch.nn.functional.batch_norm(input, *peer_statistics, weight, bias, training=True)
        if residual is not None:
            out = out + residual
        return torch.relu_(out) if relu else out

    inputs = (activations(), weight, bias)
    return Problem((*inputs, activations()) if residual else inputs, ours, peer)


def cost(elements: int, element_size: int, residual: bool) -> tuple[Cost, Cost]:
    """Forward reads the input twice (statistics, then output) and writes once; backward reads input and gradient twice
    and writes one gradient. A residual is read once more, and its gradient written."""
    forward = (3 + residual) * elements * element_size
    backward = (5 + residual) * elements * element_size
    return Cost(forward, 6 * elements), Cost(forward + backward, 16 * elements)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """Every shape in every layout and type of its class; only the first shape for a quick run."""
    for group, layouts, group_dtypes, relu, residual in GPU_GROUPS if gpu else GROUPS:
        for dtype in dtypes:
            if str(dtype).removeprefix("torch.") not in group_dtypes:
                continue
            for layout in layouts:
                shapes = GPU_SHAPES if gpu else SHAPES
                for name, shape in shapes[:1] if quick else shapes:
                    elements = shape[0] * shape[1] * shape[2] * shape[3]
                    yield Case(
                        "batch_norm",
                        f"batch norm {group}, {layout}",
                        f"{name} ({'x'.join(map(str, shape))})",
                        dtype,
                        partial(problem, shape, layout, dtype, relu, residual),
                        *cost(elements, dtype.itemsize, residual),
                    )
