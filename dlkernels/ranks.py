"""Which of the processes that ``torchrun`` has started this one is; alone, the only one."""

from __future__ import annotations

import torch.distributed as dist


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
