"""The last linear layer of a language model together with its loss, against torch's two operators."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .harness import Case, Cost, Problem

# Name, rows, hidden size, vocabulary.
LINEAR = (("GPT-2", 256, 768, 50_257),)
GPU_LINEAR = (("GPT-2", 8192, 768, 50_257), ("4,096 features", 8192, 4096, 128_256))


def linear_problem(rows: int, hidden: int, classes: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """The last layer of a language model and its loss; ours in one, without the logits in memory."""
    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, hidden, generator=generator, device=device) / hidden**0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator, device=device)

    def ours(states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(states, weight, target)

    def peer(states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(states, weight), target)

    return Problem((states, weight, target), ours, peer)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """Linear cross-entropy of float32 hidden states, on a GPU of bfloat16 ones too."""
    for dtype in dtypes:
        if dtype != torch.float32 and not (gpu and dtype == torch.bfloat16):
            continue
        shapes = GPU_LINEAR if gpu else LINEAR
        for name, rows, hidden, classes in shapes[:1] if quick else shapes:
            rows = rows // 4 if quick else rows
            moved = dtype.itemsize * (rows * hidden + classes * hidden)
            products = 2 * rows * hidden * classes
            yield Case(
                "linear_cross_entropy",
                "linear cross-entropy",
                f"{name} ({rows}x{hidden} to {classes:,})",
                dtype,
                partial(linear_problem, rows, hidden, classes, dtype),
                Cost(moved, products),
                Cost(3 * moved, 3 * products),
            )
