"""The compiled extension: one function an operation. Written by `make stub`."""

import torch

def available_isas() -> list[str]: ...
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor: ...
def isa() -> str: ...
def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor: ...
def select_isa(name: str) -> bool: ...
