"""Losses of image classifiers (10 to 1,000 classes) and of language models (vocabularies of 32,000 to 50,257)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .harness import Case, Cost, Problem

# Class, element types, (name, rows, classes); a quick run takes the first of each class.
GROUPS = (
    ("C 10-100", ("float32",), (("CIFAR-10", 128, 10), ("CIFAR-100", 256, 100), ("char-LSTM", 2048, 65))),
    ("C 1000", ("float32",), (("ImageNet", 256, 1000), ("ImageNet", 64, 1000))),
    (
        "vocabulary",
        ("float32", "bfloat16"),
        (("32k", 256, 32_000), ("GPT-2", 256, 50_257), ("GPT-2 padded", 256, 50_304)),
    ),
)
# Name, rows, hidden size, vocabulary.
LINEAR = (("GPT-2", 256, 768, 50_257),)


def problem(rows: int, classes: int, dtype: torch.dtype) -> Problem:
    """Random logits and class indices."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)

    def ours(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target)

    def peer(logits: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, target)

    return Problem((logits, target), ours, peer)


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
    """The losses alone, then with the linear layer before them."""
    for group, group_dtypes, shapes in GROUPS:
        for dtype in dtypes:
            if str(dtype).removeprefix("torch.") not in group_dtypes:
                continue
            for name, rows, classes in shapes[:1] if quick else shapes:
                moved = rows * classes * dtype.itemsize  # forward reads the logits; backward reads and writes
                yield Case(
                    "cross_entropy",
                    f"cross-entropy {group}",
                    f"{name} ({rows}x{classes:,})",
                    dtype,
                    partial(problem, rows, classes, dtype),
                    Cost(moved, 4 * rows * classes),
                    Cost(3 * moved, 8 * rows * classes),
                )
    if torch.float32 in dtypes:
        for name, rows, hidden, classes in LINEAR:
            rows = rows // 4 if quick else rows
            moved = 4 * (rows * hidden + classes * hidden)
            products = 2 * rows * hidden * classes
            yield Case(
                "cross_entropy",
                "linear cross-entropy",
                f"{name} ({rows}x{hidden} to {classes:,})",
                torch.float32,
                partial(linear_problem, rows, hidden, classes, torch.float32),
                Cost(moved, products),
                Cost(3 * moved, 3 * products),
            )
