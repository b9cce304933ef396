"""Networks that follow another one slowly: the key encoder of MoCo, the teacher of DINO."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

ModuleType = TypeVar("ModuleType", bound=torch.nn.Module)


def follower(network: ModuleType) -> ModuleType:
    """A copy of ``network`` that no gradient reaches."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(slow: torch.nn.Module, fast: torch.nn.Module, momentum: float) -> None:
    """Moves each parameter of ``slow`` to ``momentum * slow + (1 - momentum) * fast``.

    Buffers stay: batch norm's statistics are those of what ``slow`` itself has seen.
    """
    get_ema_multi_avg_fn(momentum)(list(slow.parameters()), list(fast.parameters()), 0)


def check_momentum(momentum: float) -> None:
    """Raises a ValueError unless ``momentum`` is in [0, 1]."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be between 0 and 1, got {momentum}")
