"""Who answers a call that is not simply tensors on their way to a kernel.

``_C.is_special`` tells such calls from the others, at the cost of one function of C. torch answers where ``torch.func``
transforms the call and where an argument is of a subclass of ``Tensor`` with behaviour of its own: both know torch's
functions only. What records calls, as the proxies of ``torch.fx`` do, is given our function to record.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .registration import in_transform, traced_as

_PLAIN = (Tensor, torch.nn.Parameter, type(None))

# Subclasses that hand every operator on to what they hold, by name: some of these modules take long to import.
_TRANSPARENT = {
    ("torch._subclasses.fake_tensor", "FakeTensor"),
    ("torch._subclasses.functional_tensor", "FunctionalTensor"),
    ("torch.distributed._functional_collectives", "AsyncCollectiveTensor"),
}
_DISTRIBUTED = "torch.distributed.tensor"


@traced_as(_C.is_special)
def _traced(*values: Any) -> bool:
    return in_transform() or any(type(value) not in _PLAIN for value in values)


def subclass_for_torch(operation: str, values: Iterable[Any]) -> type | None:
    """The class for whose sake torch must compute a call of ``operation`` with these arguments; None where ours can."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    for kind in map(type, tensors):
        if kind in _PLAIN or _is_transparent(kind):
            continue
        if kind.__module__ == _DISTRIBUTED and kind.__name__ == "DTensor" and _sharding().runs_here(operation, tensors):
            continue
        return kind
    return None


def _is_transparent(kind: type) -> bool:
    if (kind.__module__, kind.__name__) in _TRANSPARENT:
        return True
    # A subclass that asks for neither protocol differs from Tensor in Python only.
    asks_function = kind.__torch_function__ is not torch._C._disabled_torch_function_impl  # type: ignore[attr-defined]
    asks_dispatch = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    return not (asks_function or asks_dispatch)


def _sharding() -> Any:
    return sys.modules[f"{__package__}.sharding"]  # imported together with DTensor


def torch_has_rules() -> bool:
    """Whether torch's own LSTMs and attention have rules for what is active: they have for gradients alone."""
    if not torch._C._are_functorch_transforms_active():
        return not in_transform()
    if torch.compiler.is_dynamo_compiling():
        return False  # the compiler does not tell the transforms apart
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return all(transform.key() == torch._C._functorch.TransformType.Grad for transform in transforms)


def elsewhere(
    operation: str,
    ours: Callable[..., Any],
    torchs: Callable[..., Any],
    tensors: tuple[Any, ...],
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """What ``ours(*arguments, **keywords)`` is when our kernels do not compute it; NotImplemented where they do.

    Args:
        operation: one of ``dlkernels.operations.OPERATIONS``.
        torchs: computes the same by functions of torch alone.
        tensors: the arguments that may be tensors.
    """
    if any(not isinstance(tensor, Tensor) and hasattr(type(tensor), "__torch_function__") for tensor in tensors):
        return torch.overrides.handle_torch_function(ours, tensors, *arguments, **keywords)
    if in_transform() or subclass_for_torch(operation, tensors) is not None:
        return torchs(*arguments, **keywords)
    return NotImplemented
