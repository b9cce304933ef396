"""What the losses exchange where several processes share a batch (``torchrun``); alone, each function does nothing.

Every process brings equally many rows. A loss is then the mean over the process's own rows, with the rows of all
processes to tell them from: the mean of these losses, and of their gradients (as DistributedDataParallel takes it), is
that of one process on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ranks import rank, size


def _all_gather(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks; each row's gradient is the sum of all processes'."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # type: ignore[override]
        return _all_gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(size())[rank()]


def gathered(rows: Tensor) -> Tensor:
    """``[N, ...]`` of each process to ``[size() * N, ...]``, the same on all.

    Raises:
        ValueError: the processes have different numbers of rows.
    """
    if size() == 1:
        return rows
    counts = _all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    if min(counts) != max(counts):
        raise ValueError(f"every process must bring equally many rows, got {counts}")
    return _Gather.apply(rows)


def own_rows(count: int, device: torch.device) -> Tensor:
    """Where this process's ``count`` rows are among those gathered, ``[count]``."""
    return torch.arange(count, device=device) + rank() * count


def mean(x: Tensor) -> Tensor:
    """The mean over all processes, without gradient."""
    if size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / size()


@torch.no_grad()
def shuffled(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function(rows)``, computed on rows drawn from those of all processes, without gradient.

    Batch norm in ``function`` then normalises other rows together than the process's own, so that its statistics tell
    nothing about which rows belong together (shuffling BN, section 3.3 of He et al. 2020).
    """
    if size() == 1:
        return function(rows)
    everything = gathered(rows)
    order = torch.randperm(len(everything), device=rows.device)
    dist.broadcast(order, src=0)
    results = gathered(function(everything[order[own_rows(len(rows), rows.device)]]))
    return results[order.argsort()[own_rows(len(rows), rows.device)]]
