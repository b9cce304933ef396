"""The last layer's features: the space in which the network's own linear classifier tells the classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .inspection import BATCH_SIZE, checked_images, hooked, inspecting


def last_features(model: torch.nn.Module, images: Tensor) -> Tensor:
    """What the last linear layer that the model calls is given for each image, ``[N, D]``.

    Args:
        images: ``[N, C, H, W]``.

    Raises:
        ValueError: the model calls no linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs: list[Tensor] = []
    parts = []
    with inspecting(model), hooked(linear, lambda module, arguments, output: inputs.append(arguments[0])):
        for part in checked_images(images).split(BATCH_SIZE):
            inputs.clear()
            model(part)
            if not inputs:
                raise ValueError(f"model must call a torch.nn.Linear, {type(model).__name__} does not")
            parts.append(inputs[-1].flatten(1).clone())
    return torch.cat(parts)
