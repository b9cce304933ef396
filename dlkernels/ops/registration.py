"""What every operation shares: how ``torch.compile`` sees the extension's functions, its operators fake tensors, and
which calls are torch's to make."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._build_info import BUILD_INFO
from .once_imported import once_imported

Fake = TypeVar("Fake", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("dlkernels", "IMPL")  # its end would take the registrations back


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
        _register_refusal(operator, names)
        return fake

    return decorate


def _register_refusal(operator: str, names: list[str]) -> None:
    """What ``operator`` does with tensors that it has no kernel for: it says which these are and what was built."""
    name = operator.removeprefix("dlkernels::")

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        tensors = {n: v for n, v in (dict(zip(names, args, strict=False)) | kwargs).items() if isinstance(v, Tensor)}
        strange = [n for n, v in tensors.items() if v.device.type not in ("cpu", "cuda") or v.layout != torch.strided]
        argument = (strange or list(tensors))[0]
        tensor = tensors[argument]
        cuda = f"for CUDA {BUILD_INFO['cuda']}" if BUILD_INFO.get("cuda") else "none for CUDA"
        raise NotImplementedError(
            f"{name}: {argument} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, expected a "
            f"torch.strided one on the CPU or a CUDA device (this build has kernels for the CPU and {cuda}); "
            "convert it or call torch's operator"
        )

    # Whatever has a kernel of its own, as CPU, CUDA and Meta have, does not come to this one.
    _LIBRARY.impl(name, refuse, "CompositeExplicitAutograd")


def traced_as(entry: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the operator-level spelling of ``entry``, a function of the extension.

    The extension's function is the fast way in for eager code, but opaque to ``torch.compile``; the decorated function
    says the same with ``torch.ops.dlkernels`` and is what gets traced in its place. Eager calls do not pass through it.
    """

    def decorate(traced: Callable[..., Any]) -> Callable[..., Any]:
        once_imported(
            "torch._dynamo", lambda: torch.compiler.substitute_in_graph(entry, skip_signature_check=True)(traced)
        )
        return traced

    return decorate


def in_transform() -> bool:
    """Whether ``torch.func`` transforms this call, or a derivative goes forward with it.

    Our operators have no rules for either. torch's have, so the operations hand such calls to them.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


for _module, _part in (("torch.utils.flop_counter", "flop_formulas"), ("torch.distributed.tensor", "sharding")):
    once_imported(_module, functools.partial(importlib.import_module, f"{__package__}.{_part}"))
