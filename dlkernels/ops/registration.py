"""What every operation shares: how ``torch.compile`` sees the extension's functions, its operators fake tensors, and
which calls are torch's to make."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Fake = TypeVar("Fake", bound=Callable[..., Any])


def register_fake(operator: str, on_cpu: tuple[str, ...] = ()) -> Callable[[Fake], Fake]:
    """Registers the decorated function as what ``operator`` does with fake and meta tensors.

    A call with tensors of the meta device comes here even where others have data, and not to the kernel that compares
    devices; it is refused here. The parameters in ``on_cpu`` lie there whatever the device of the others.
    """

    def decorate(fake: Fake) -> Fake:
        names = list(inspect.signature(fake).parameters)

        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            values = dict(zip(names, args, strict=False)) | kwargs
            tensors = {n: v for n, v in values.items() if isinstance(v, Tensor) and n not in on_cpu}
            (first, expected), *others = tensors.items()
            for name, tensor in others:
                if tensor.device != expected.device:
                    raise RuntimeError(
                        f"{operator.removeprefix('dlkernels::')}: Expected all tensors to be on the same device, but "
                        f"{first} is on {expected.device} and {name} is on {tensor.device}"
                    )
            return fake(*args, **kwargs)

        torch.library.register_fake(operator)(checked)
        return fake

    return decorate


def traced_as(entry: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the operator-level spelling of ``entry``, a function of the extension.

    The extension's function is the fast way in for eager code, but opaque to ``torch.compile``; the decorated function
    says the same with ``torch.ops.dlkernels`` and is what gets traced in its place. Eager calls do not pass through it.
    """
    return torch.compiler.substitute_in_graph(entry, skip_signature_check=True)


def in_transform() -> bool:
    """Whether ``torch.func`` transforms this call, or a derivative goes forward with it.

    Our operators have no rules for either. torch's have, so the operations hand such calls to them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
