"""Neighbouring layers that one kernel computes, as long as nobody looks between them."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d

_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
# What functional.batch_norm calls the activations that modules are. Exact types: a subclass may be another function.
_ACTIVATIONS: dict[type[torch.nn.Module], str | None] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.Identity: None,
}


def is_watched(module: torch.nn.Module) -> bool:
    """Whether somebody waits for the module to be called: a hook, on it or on all modules, or another ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def norm_activation(
    norm: torch.nn.Module, activation: torch.nn.Module, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``activation(norm(input) + residual)``, in one kernel where ``norm`` is our batch norm and the kernel knows
    ``activation``.

    A hook on either module (an activation map, guided backpropagation) sees the calls that it waits for: both modules
    are then called one after the other. Results agree to rounding.

    Args:
        norm: any module; one of :class:`dlkernels.nn.BatchNorm2d` and its siblings can be fused.
        activation: any module; ``torch.nn.ReLU``, ``ReLU6`` and ``Identity`` can be fused.
        input: what ``norm`` takes.
        residual: shaped as ``input``; added before the activation.

    Examples:
        >>> norm, relu, images = BatchNorm2d(8), torch.nn.ReLU(), torch.randn(2, 8, 4, 4)
        >>> output = norm_activation(norm, relu, images, residual=images)
        >>> torch.allclose(output, relu(norm(images) + images), atol=1e-5)
        True
    """
    fusable = isinstance(norm, _BATCH_NORMS) and type(activation) in _ACTIVATIONS
    promotes = isinstance(residual, Tensor) and residual.dtype != input.dtype  # a proxy of torch.fx has no type
    if fusable and not promotes and not is_watched(norm) and not is_watched(activation):
        return norm(input, activation=_ACTIVATIONS[type(activation)], residual=residual)
    normalized = norm(input)
    return activation(normalized if residual is None else normalized + residual)


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that computes each of our batch norms together with the module after it, as
    :func:`norm_activation` does.

    Examples:
        >>> Sequential(torch.nn.Conv2d(3, 8, 3), BatchNorm2d(8), torch.nn.ReLU())(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 6, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        """What the first module takes to what the last returns."""
        norm = None  # met, and waiting for the module after it
        for module in self:
            if norm is not None:
                input = norm_activation(norm, module, input)
                norm = None
            elif isinstance(module, _BATCH_NORMS):
                norm = module
            else:
                input = module(input)
        return input if norm is None else norm(input)
