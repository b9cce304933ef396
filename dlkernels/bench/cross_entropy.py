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


GPU_GROUPS = (
    ("C 10-100", ("float32",), (("CIFAR-10", 16_384, 10), ("CIFAR-100", 16_384, 100), ("char-LSTM", 131_072, 65))),
    ("C 1000", ("float32", "bfloat16"), (("ImageNet", 65_536, 1000),)),
    (
        "vocabulary",
        ("float32", "bfloat16"),
        (("GPT-2", 8192, 50_257), ("GPT-2 padded", 8192, 50_304), ("32k", 8192, 32_000), ("128k", 4096, 128_256)),
    ),
)


def problem(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random logits and class indices."""
    generator = torch.Generator(device).manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=generator, device=device)).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator, device=device)

    def ours(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target)

    def peer(logits: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, target)

    return Problem((logits, target), ours, peer)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """The losses alone."""
    for group, group_dtypes, shapes in GPU_GROUPS if gpu else GROUPS:
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
