"""Existing models on our kernels: ``dlkernels.convert(model)`` exchanges the classes of its modules, and nothing else.

Every class of ``dlkernels.nn`` adds code to a class of ``torch.nn`` and no state, so that a module changes from one to
the other by its ``__class__``: parameters, buffers, hooks and whoever refers to it stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from . import nn
from .operations import chosen_operations


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` without its fused inference path, which goes past the modules inside."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``src`` ``[N, S, E]`` or ``[S, N, E]`` to the same shape; nested tensors take torch's path."""
        if src.is_nested:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(src + self._ff_block(src))


# torch's class, ours, and the operations any of which makes the exchange worth while.
_CLASSES: tuple[tuple[type[torch.nn.Module], type[torch.nn.Module], tuple[str, ...]], ...] = (
    (torch.nn.Conv2d, nn.Conv2d, ("conv2d",)),
    (torch.nn.BatchNorm1d, nn.BatchNorm1d, ("batch_norm",)),
    (torch.nn.BatchNorm2d, nn.BatchNorm2d, ("batch_norm",)),
    (torch.nn.BatchNorm3d, nn.BatchNorm3d, ("batch_norm",)),
    (torch.nn.Sequential, nn.Sequential, ("batch_norm",)),
    (torch.nn.LSTM, nn.LSTM, ("lstm",)),
    (torch.nn.LSTMCell, nn.LSTMCell, ("lstm",)),
    (torch.nn.Linear, nn.Linear, ("linear",)),
    (torch.nn.CrossEntropyLoss, nn.CrossEntropyLoss, ("cross_entropy",)),
    (torch.nn.MultiheadAttention, nn.MultiheadAttention, ("attention",)),
    (torch.nn.TransformerEncoderLayer, TransformerEncoderLayer, ("attention", "linear")),
)
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # torch 2.13
    _CLASSES += ((torch.nn.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss, ("linear_cross_entropy",)),)
_OURS = {torchs: ours for torchs, ours, _ in _CLASSES}
_TORCHS = {ours: torchs for torchs, ours, _ in _CLASSES}

# In the instance's __dict__, of modules that revert() gives back: not of those that were built from dlkernels.nn.
_MARK = "_dlkernels_converted"


def convert(
    model: torch.nn.Module,
    ops: Iterable[str] | None = None,
    skip: Iterable[str | type[torch.nn.Module]] = (),
) -> torch.nn.Module:
    """Puts the modules of ``model`` that are one of our operations on our kernels, in place; returns ``model``.

    Only instances of exactly the classes of ``torch.nn`` are exchanged; :func:`report` lists what was not, and why.
    Parameters, buffers, hooks, parametrisations (``weight_norm`` and its like), pruning and sharing are kept, so that
    optimizers and ``state_dict`` need nothing. Calling it twice changes nothing more. Calls of functions in the model's
    own code are not reached: :func:`dlkernels.override` does that. Convert before wrapping in FSDP2's ``fully_shard``,
    which gives the modules that it shards classes of their own; other wrappers may come before or after.

    ``isinstance`` finds converted modules under torch's classes. Code that compares classes exactly does not, and
    mostly says nothing: ``type(m) is nn.Linear``, a dict of classes, ``quantize_dynamic(model, {nn.Linear})`` and its
    relatives in ``torch.ao.quantization`` and ``torch.ao.pruning``. Let it have the model first, or after
    :func:`revert`.

    Args:
        model: any module.
        ops: the operations to take, by name, all by default: ``"conv2d"``, ``"batch_norm"``, ``"lstm"``, ``"linear"``,
            ``"cross_entropy"``, ``"linear_cross_entropy"``, ``"attention"``.
        skip: qualified names and classes of modules to leave to torch, with all that is inside them.

    Raises:
        ValueError: ``ops`` names something that is not an operation, ``skip`` a module that ``model`` does not have.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        >>> weight = model[0].weight
        >>> convert(model)[0].weight is weight
        True
        >>> type(model[0]).__module__
        'dlkernels.nn.linear'
    """
    wanted = chosen_operations(ops)
    chosen = {torchs for torchs, _, operations in _CLASSES if any(name in wanted for name in operations)}
    for module in _modules_outside(model, skip):
        if _torch_class(module) in chosen:
            _exchange(module, _OURS)
            module.__dict__[_MARK] = True
    return model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Gives the modules that :func:`convert` exchanged their classes back, in place; returns ``model``.

    Examples:
        >>> type(revert(convert(torch.nn.Linear(4, 2))))
        <class 'torch.nn.modules.linear.Linear'>
    """
    for module in model.modules():
        if module.__dict__.pop(_MARK, False):
            _exchange(module, _TORCHS)
    return model


class ModuleReport(NamedTuple):
    """A module that is one of our operations, or might be taken for one."""

    name: str
    kind: str
    left: str | None  # why torch computes it; None where our kernels do


class Report(tuple[ModuleReport, ...]):
    """What :func:`report` found; printing it gives a table.

    Its last line warns of tools that look for torch's classes, where they would not find a module that is here.
    """

    def __str__(self) -> str:
        here = Counter(module.kind for module in self if module.left is None)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(here.items()))
        lines = [f"{sum(here.values())} of {len(self)} modules run on dlkernels" + (f": {counts}" if counts else "")]
        left = [module for module in self if module.left is not None]
        width_of_name = max((len(module.name) for module in left), default=0)
        width_of_kind = max((len(module.kind) for module in left), default=0)
        lines += [f"{module.name:<{width_of_name}}  {module.kind:<{width_of_kind}}  {module.left}" for module in left]
        lines += [_EXACT_CLASSES] if here else []
        return "\n".join(lines)


_EXACT_CLASSES = (
    "code that compares classes exactly (type(m) is nn.Linear, torch.ao.quantization) does not find these modules"
)


def report(model: torch.nn.Module) -> Report:
    """Which modules of ``model`` run on our kernels, and why others do not.

    Lists the modules of our operations and their relatives (other convolutions, norms and recurrent layers, subclasses,
    quantized modules); not what is unrelated, and not what functions called by the model's own code compute.

    Examples:
        >>> model = convert(torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.BatchNorm1d(8)))
        >>> print(report(model))
        1 of 2 modules run on dlkernels: BatchNorm1d 1
        0  Conv1d  not one of the operations
        code that compares classes exactly (type(m) is nn.Linear, torch.ao.quantization) does not find these modules
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Sequential, torch.nn.TransformerEncoderLayer)):
            continue  # containers: what is inside counts
        kind = _class_without_parametrization(module)
        reason = _why_left(module, kind)
        if reason is not None or issubclass(kind, tuple(_TORCHS)):
            rows.append(ModuleReport(name or "(the model)", kind.__name__, reason))
    return Report(rows)


_FORWARD_REPLACED = "its forward was replaced on the instance"
_RELATIVES = (
    torch.nn.modules.conv._ConvNd,
    torch.nn.modules.batchnorm._NormBase,
    torch.nn.RNNBase,
    torch.nn.modules.rnn.RNNCellBase,
    torch.nn.Bilinear,
    torch.nn.NLLLoss,
)


def _why_left(module: torch.nn.Module, kind: type[torch.nn.Module]) -> str | None:
    """Why torch computes a module of class ``kind``; None for ours and for what is no relative of our operations."""
    if kind in _OURS:
        return _FORWARD_REPLACED if "forward" in module.__dict__ else "convert() was not asked to take it"
    if issubclass(kind, tuple(_TORCHS)):
        return None
    if kind.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat")):
        return "quantized"
    if not issubclass(kind, (*_RELATIVES, *_OURS)):
        return None
    if issubclass(kind, torch.nn.modules.lazy.LazyModuleMixin):
        return "has no parameters yet: call the model once, then convert"
    if issubclass(kind, torch.nn.SyncBatchNorm):
        return "synchronises its statistics between processes"
    if kind is torch.nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "computed by the MultiheadAttention that holds it"
    bases = [base for base in kind.__mro__[1:] if base in _OURS]
    if not bases:
        return "not one of the operations"
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        return "sharded by FSDP2: convert before fully_shard"
    return f"a subclass of {bases[0].__name__}, which may compute something else"


def _modules_outside(model: torch.nn.Module, skip: Iterable[str | type[torch.nn.Module]]) -> Iterator[torch.nn.Module]:
    """The modules of ``model`` that are neither skipped nor only inside one that is."""
    if isinstance(skip, (str, type)):
        raise ValueError(f"skip must be a sequence of names and classes, got {skip!r}")
    skip = tuple(skip)
    names = {entry for entry in skip if isinstance(entry, str)}
    kinds = tuple(entry for entry in skip if isinstance(entry, type))
    unknown = names - {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown:
        raise ValueError(f"skip names {', '.join(map(repr, sorted(unknown)))}: the model has no such module")
    skipped = {
        id(inner)
        for name, module in model.named_modules(remove_duplicate=False)
        if name in names or isinstance(module, kinds)
        for inner in module.modules()
    }
    return (module for module in model.modules() if id(module) not in skipped)


def _class_without_parametrization(module: torch.nn.Module) -> type[torch.nn.Module]:
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _torch_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class in place of which ours can be put; None where there is none or its ``forward`` is not used."""
    kind = _class_without_parametrization(module)
    return kind if kind in _OURS and "forward" not in module.__dict__ else None


def _exchange(module: torch.nn.Module, classes: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Gives ``module`` the counterpart of its class; a parametrised module, whose class torch made for it alone, a copy
    of that on the counterpart."""
    kind = type(module)
    if not is_parametrized(module):
        module.__class__ = classes[kind]
        return
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, (classes[kind.__bases__[0]],), members)
