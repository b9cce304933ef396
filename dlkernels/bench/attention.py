"""Attention of ViT-S/B (Dosovitskiy et al. 2021) and, causal, of GPT-2 and a character-level GPT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .harness import Case, Cost, Problem

# Class, causal, element types, (name, batch, heads, queries = keys, head size); a quick run takes the first.
GROUPS = (
    (
        "full",
        False,
        ("float32", "bfloat16"),
        (("ViT-S/16", 4, 6, 197, 64), ("ViT-B/16", 4, 12, 197, 64), ("ViT-B/16 384 px", 1, 12, 577, 64)),
    ),
    (
        "causal",
        True,
        ("float32", "bfloat16"),
        (("char-GPT", 8, 6, 256, 64), ("GPT-2", 2, 12, 512, 64), ("GPT-2, short", 4, 12, 128, 64)),
    ),
)


GPU_GROUPS = (
    (
        "full",
        False,
        ("float32", "bfloat16"),
        (
            ("d 128", 4, 16, 4096, 128),
            ("d 128, long", 1, 16, 16_384, 128),
            ("d 64", 4, 16, 4096, 64),
            ("ViT-B/16", 64, 12, 197, 64),
            ("d 64, short", 32, 16, 512, 64),
        ),
    ),
    (
        "causal",
        True,
        ("float32", "bfloat16"),
        (("d 128", 4, 16, 4096, 128), ("GPT-2", 16, 12, 1024, 64), ("GPT-2, short", 32, 12, 256, 64)),
    ),
)

# torch's own kernels for the same, each of which takes only some types.
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")


def forced(backend: str, causal: bool) -> Callable[..., Tensor]:
    """torch's attention by one of its kernels alone."""

    def peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return peer


def problem(shape: tuple[int, int, int, int], causal: bool, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random query, key and value."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, device=device) for _ in range(3)]
    query, key, value = (tensor.to(dtype).requires_grad_() for tensor in drawn)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    backends = BACKENDS if device.type == "cuda" else ()
    others = {name.lower().replace("_", " "): forced(name, causal) for name in backends}
    return Problem((query, key, value), ours, peer, others)


def cost(batch: int, heads: int, length: int, size: int, causal: bool, element_size: int) -> tuple[Cost, Cost]:
    """Two products of length x length x size forward and five backward, half of each below the diagonal."""
    product = 2 * batch * heads * length * (length + 1 if causal else 2 * length) // 2 * size
    tensor = batch * heads * length * size * element_size
    return Cost(4 * tensor, 2 * product), Cost(12 * tensor, 7 * product)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """Every shape in every type of its class; only the first shape for a quick run."""
    for group, causal, group_dtypes, shapes in GPU_GROUPS if gpu else GROUPS:
        for dtype in dtypes:
            if str(dtype).removeprefix("torch.") not in group_dtypes:
                continue
            for name, *sizes in shapes[:1] if quick else shapes:
                shape = (sizes[0], sizes[1], sizes[2], sizes[3])
                yield Case(
                    "attention",
                    f"attention {group}",
                    f"{name} ({'x'.join(map(str, shape))})",
                    dtype,
                    partial(problem, shape, causal, dtype),
                    *cost(*shape, causal, dtype.itemsize),
                )
