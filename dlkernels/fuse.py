"""Batch norm folded into the convolution or linear layer before it, for evaluation.

With fixed statistics batch norm is an affine map of each channel, ``y * scale + shift``, which the layer before it can
compute with other weights: the pass over its output is saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from . import nn
from .nn.fused import is_watched

# The layers that a batch norm can be folded into. Exact types: a subclass may compute something else.
_LAYERS_BEFORE: dict[type[torch.nn.Module], tuple[type[torch.nn.Module], ...]] = {
    torch.nn.BatchNorm1d: (torch.nn.Linear, torch.nn.Conv1d, nn.Linear),
    torch.nn.BatchNorm2d: (torch.nn.Conv2d, nn.Conv2d),
    torch.nn.BatchNorm3d: (torch.nn.Conv3d,),
    nn.BatchNorm1d: (torch.nn.Linear, torch.nn.Conv1d, nn.Linear),
    nn.BatchNorm2d: (torch.nn.Conv2d, nn.Conv2d),
    nn.BatchNorm3d: (torch.nn.Conv3d,),
}


class Tracer(torch.fx.Tracer):
    """``torch.fx``'s tracer that keeps the layers of ``dlkernels.nn`` whole, as it does those of ``torch.nn``."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of the module is one node of the graph; ``Sequential`` is as many as it has modules."""
        ours = any(base.__module__.startswith(nn.__name__) for base in type(m).__mro__)
        return (ours and not isinstance(m, torch.nn.Sequential)) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Traces the module without its hooks, which wait for numbers."""
        return super().call_module(m, m.forward, args, kwargs)


class FoldedNorm(torch.nn.Identity):
    """Stands where a batch norm stood that the layer before it computes now.

    Args:
        dimensions: of its input. A batch norm has the channels in dimension 1, a linear layer in the last: the two are
            one only for ``[N, C]``.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, input: Tensor, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        """``input``, with the rest of what the batch norm was called for."""
        torch._assert(input.dim() == self.dimensions, f"a folded batch norm takes {self.dimensions} dimensions")
        output = input if residual is None else input + residual
        if activation == "relu6":
            return torch.nn.functional.relu6(output)
        return output if activation is None else torch.relu(output)

    def extra_repr(self) -> str:
        return f"dimensions={self.dimensions}"


def fuse(model: torch.nn.Module) -> torch.nn.Module:
    """Folds every batch norm of ``model`` into the convolution or linear layer before it, in place; returns ``model``.

    For networks on ``dlkernels.nn`` and on ``torch.nn``. Results agree to rounding; the layer has new parameters, the
    norm gives way to an identity. Left as they are: pairs with anything between them or with another reader of the
    layer's output; layers and norms called more than once, known under several names or watched by a hook; norms
    without running statistics.

    Args:
        model: in evaluation mode; its calls are found by symbolic tracing, which runs ``forward`` without numbers.

    Raises:
        ValueError: ``model`` is in training mode, or ``torch.fx`` cannot trace it, for instance because its ``forward``
            branches on values.

    Examples:
        >>> model = torch.nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> images = torch.randn(2, 3, 8, 8)
        >>> expected = model(images)
        >>> fuse(model)[1]
        FoldedNorm(dimensions=4)
        >>> torch.allclose(model(images), expected, atol=1e-5)
        True
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode; call model.eval() first")
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise ValueError(f"torch.fx cannot trace {type(model).__name__}, so nothing was folded: {error}") from error
    modules: dict[Any, Any] = dict(model.named_modules())
    for layer_name, norm_name in _foldable_pairs(model, graph, modules):
        layer = modules[layer_name]
        _fold(modules[norm_name], layer)
        model.set_submodule(norm_name, FoldedNorm(layer.weight.dim()).eval())
    return model


def _foldable_pairs(model: torch.nn.Module, graph: torch.fx.Graph, modules: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Names of the layers and of the norms after them."""
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read_directly = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def is_alone(name: Any) -> bool:
        return calls[name] == 1 and names[modules[name]] == 1 and name not in read_directly

    def is_watched_between(layer_name: str, norm_name: str) -> bool:
        between = _with_containers(layer_name) ^ _with_containers(norm_name)
        return any(is_watched(modules[name]) for name in between)

    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) not in _LAYERS_BEFORE or not node.args:
            continue
        norm, before = modules[node.target], node.args[0]
        if not isinstance(before, torch.fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if [*node.args, *node.kwargs.values()].count(before) != 1:  # the output is the residual too
            continue
        layer = modules[before.target]
        fits = type(layer) in _LAYERS_BEFORE[type(norm)] and layer.weight.shape[0] == norm.num_features
        fixed = not norm.training and norm.running_mean is not None and norm.running_var is not None
        alone = is_alone(node.target) and is_alone(before.target)
        if fits and fixed and alone and not is_watched_between(str(before.target), node.target):
            pairs.append((before.target, node.target))
    return pairs


def _with_containers(name: str) -> set[str]:
    """``a.b.c`` to ``{a, a.b, a.b.c}``."""
    parts = name.split(".")
    return {".".join(parts[: end + 1]) for end in range(len(parts))}


@torch.no_grad()
def _fold(norm: Any, layer: torch.nn.Linear | _ConvNd) -> None:
    """Gives ``layer`` weights with which it computes what ``norm`` made of its output."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)  # halves are rounded once, at the end
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    shift = -norm.running_mean.to(dtype) if layer.bias is None else layer.bias.to(dtype) - norm.running_mean
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    for name, value in (("weight", weight), ("bias", shift)):
        parameter = torch.nn.Parameter(value.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        setattr(layer, name, parameter)
