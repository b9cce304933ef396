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


def linear_problem(rows: int, hidden: int, classes: int, dtype: torch.dtype) -> Problem:
    """The last layer of a language model and its loss; ours in one, without the logits in memory."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(classes, hidden, generator=generator) / hidden**0.5).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)

    def ours(states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(states, weight, target)

    def peer(states: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(states, weight), target)

    return Problem((states, weight, target), ours, peer)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False) -> Iterator[Case]:
    """Linear cross-entropy of float32 hidden states."""
    if torch.float32 not in dtypes:
        return
    for name, rows, hidden, classes in LINEAR:
        rows = rows // 4 if quick else rows
        moved = 4 * (rows * hidden + classes * hidden)
        products = 2 * rows * hidden * classes
        yield Case(
            "linear_cross_entropy",
            "linear cross-entropy",
            f"{name} ({rows}x{hidden} to {classes:,})",
            torch.float32,
            partial(linear_problem, rows, hidden, classes, torch.float32),
            Cost(moved, products),
            Cost(3 * moved, 3 * products),
        )
