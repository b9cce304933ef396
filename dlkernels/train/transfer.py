"""Transfer: a trained network takes on other classes (Yosinski et al. 2014; Howard & Ruder 2018).

First a new last layer is trained while all others stay as they are, then all of them, the earlier the more slowly::

    head = transfer.replace_head(model, num_classes=5)
    with transfer.frozen(model, head):
        train(model)
    optimizer = torch.optim.AdamW(transfer.discriminative_groups(model, 1e-3))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def replace_head(model: torch.nn.Module, num_classes: int) -> torch.nn.Linear:
    """Puts a fresh layer of ``num_classes`` outputs in the place of the last linear layer, and returns it.

    It is of the same library, type and device. Heads half-way, which GoogLeNet has, stay: ``model.aux_logits = False``
    leaves them out.

    Raises:
        ValueError: ``num_classes`` is below 2, or the network has no linear layer.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name]
    if not linear:
        raise ValueError(f"model must have a linear layer, {type(model).__name__} has none")
    name, old = linear[-1]
    head = type(old)(old.in_features, num_classes, bias=old.bias is not None).to(old.weight)
    model.set_submodule(name, head)
    return head


@contextmanager
def frozen(model: torch.nn.Module, except_for: torch.nn.Module) -> Iterator[None]:
    """Within it only the parameters of ``except_for`` have gradients; afterwards those that had them before.

    Frozen batch norms normalise by their running statistics and do not move them, whatever the mode of the model:
    otherwise the features would go on changing.

    Raises:
        ValueError: ``except_for`` has no parameters, or is not a part of the model.
    """
    kept = list(except_for.parameters())
    if not kept or except_for not in model.modules():
        raise ValueError(f"except_for must be a part of the model with parameters, got {type(except_for).__name__}")
    own, own_modules = {id(parameter) for parameter in kept}, set(except_for.modules())
    stopped = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m not in own_modules]
    modes = [norm.training for norm in norms]
    handles = [norm.register_forward_pre_hook(_use_running_statistics) for norm in norms]
    try:
        for parameter in stopped:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in stopped:
            parameter.requires_grad_(True)
        for norm, mode, handle in zip(norms, modes, handles, strict=True):
            norm.training = mode
            handle.remove()


def _use_running_statistics(norm: torch.nn.Module, inputs: object) -> None:
    norm.eval()


def discriminative_groups(model: torch.nn.Module, learning_rate: float, decay: float = 1 / 2.6) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, from the input to the output, each with a learning rate of its own.

    A group is one of the model's direct children with parameters; what the model itself holds goes with the first.
    Parameters without gradient are left out.

    Args:
        learning_rate: of the last group.
        decay: the factor from each group to the one before it; 1/2.6 in Howard & Ruder 2018.

    Raises:
        ValueError: ``learning_rate`` or ``decay`` is not positive, or no parameter has a gradient.
    """
    for name, value in (("learning_rate", learning_rate), ("decay", decay)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    children = [parameters for child in model.children() if (parameters := list(child.parameters()))] or [[]]
    children[0] = [*model.parameters(recurse=False), *children[0]]
    seen: set[torch.nn.Parameter] = set()
    groups = []
    for parameters in children:
        fresh = [parameter for parameter in parameters if parameter.requires_grad and parameter not in seen]
        seen.update(fresh)
        if fresh:
            groups.append(fresh)
    if not groups:
        raise ValueError(f"model must have a parameter with a gradient, {type(model).__name__} has none")
    rates = [learning_rate * decay**depth for depth in reversed(range(len(groups)))]
    return [{"params": parameters, "lr": rate} for parameters, rate in zip(groups, rates, strict=True)]
