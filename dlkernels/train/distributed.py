"""One process or several that ``torchrun`` has started: who takes part, what they exchange.

Every process runs the same program. All draw the same order of examples, each takes its slice of a batch, and their
gradients are averaged while the backward pass runs (DistributedDataParallel). Batch norm takes the statistics of its
own slice: a network that has it trains a little differently on several processes. In one process nothing here does
anything.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..ranks import rank as rank
from ..ranks import size as size


class OtherRankError(Exception):
    """Rank 0 could not do what all wait for, and says why itself."""


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Joins the processes that ``torchrun`` has started, if it has; gives this one's device.

    They talk through NCCL between GPUs, each process having one, and through gloo otherwise.
    """
    if "LOCAL_RANK" not in os.environ or not dist.is_available():
        yield torch.device(device)
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield own
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold what has to go first
        raise
    finally:
        # DistributedDataParallel goes before its group: letting go of the group last, it would wait for gloo's thread
        # with the interpreter locked, and that thread may be waiting for the interpreter.
        gc.collect()
        dist.destroy_process_group()


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """``module``, whose forward gives a loss, such that gradients become the mean over all processes.

    The weights and, before each forward, the buffers are made those of rank 0.
    """
    return module if size() == 1 else DistributedDataParallel(module)


def not_yet(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """In it a backward pass of what :func:`parallel` gave only adds to this process's gradients."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def totals(values: list[float], device: torch.device) -> list[float]:
    """The sums of the numbers of all processes."""
    if size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def share_buffers(module: torch.nn.Module) -> None:
    """Makes the buffers those of rank 0."""
    if size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather(text: str) -> list[str]:
    """The texts of all processes, in the order of their ranks."""
    if size() == 1:
        return [text]
    texts: list[str] = [""] * size()
    dist.all_gather_object(texts, text)
    return texts


def in_rank_0(action: Callable[[], object]) -> None:
    """Does something in rank 0 alone. All ranks must call it together, and none goes on where it fails.

    Raises:
        OtherRankError: in the other ranks, where it failed. Rank 0 raises what ``action`` does.
    """
    failure = None
    if rank() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    (failed, *_) = gather("" if failure is None else "failed")
    if failure is not None:
        raise failure
    if failed:
        raise OtherRankError
