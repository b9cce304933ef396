"""The calls that every shared suite runs: each column lists its own in a module of this package.

A :class:`Case` is one way of calling one operation. Its ``make(dtype)`` makes fresh arguments from a fixed seed; the
floating-point tensors among ``args`` are the differentiable ones, everything else goes into ``kwargs``. Build values in
float64 and cast, so that every dtype sees the same problem.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

COLUMNS = ("attention", "batch_norm", "conv2d", "cross_entropy", "linear", "linear_cross_entropy", "lstm")


_devices = [torch.device("cpu")]  # the last one is where values are made


@contextlib.contextmanager
def values_on(device: str) -> Iterator[None]:
    """Makes the values of cases on ``device``: the same numbers everywhere."""
    _devices.append(torch.device(device))
    yield
    _devices.pop()


@dataclass
class Sample:
    """Arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def differentiable(self) -> list[int]:
        """Positions in ``args`` of the tensors that take gradients."""
        return [i for i, a in enumerate(self.args) if isinstance(a, Tensor) and a.is_floating_point()]

    def requiring_grad(self) -> Sample:
        """The same call with fresh leaves that require gradients."""
        chosen = set(self.differentiable())
        args = [a.detach().clone().requires_grad_() if i in chosen else a for i, a in enumerate(self.args)]
        return Sample(tuple(args), self.kwargs)

    def to(self, dtype: torch.dtype) -> Sample:
        """The same call with every floating-point tensor cast."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Sample(tuple(map(cast, self.args)), {k: cast(v) for k, v in self.kwargs.items()})

    def on(self, device: torch.device) -> Sample:
        """The same call with its tensors on ``device``, but for a packed sequence's lengths, which torch keeps here."""

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        kwargs = {k: v if k == "batch_sizes" else moved(v) for k, v in self.kwargs.items()}
        return Sample(tuple(map(moved, self.args)), kwargs)


@dataclass
class Case:
    """One way of calling one operation, beside torch's own function for the same."""

    column: str
    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[torch.dtype], Sample]
    primary: bool = False  # the one that slow suites (torch.compile, export) run
    # Relative error in float32 that is allowed where torch's is less: what its algorithm may have, at least that of one
    # running sum of some tens of products. In which order torch adds, and so its error, depends on the processor.
    float32_error: float = 3e-7
    integers: bool = True  # small integers in give exactly representable results out
    channels_last: bool = False  # its 4-d arguments may come in torch.channels_last
    infinite_arguments: tuple[int, ...] | None = None  # where Inf must act as in torch; None for everywhere
    same_nonfinite: bool = True  # NaN and Inf appear exactly where torch has them

    def __str__(self) -> str:
        return f"{self.column}-{self.name}"

    def build(self, dtype: torch.dtype) -> Sample:
        """Fresh arguments of the case, where values are made."""
        return self.make(dtype).on(_devices[-1])


@dataclass
class OpInfoEntry:
    """An operator of torch's own test database that a function here must satisfy in full."""

    column: str
    torch_name: str
    function: Callable[..., Any]
    # Samples whose values depend on torch's own order of drawing; the column's tests check what they can promise.
    is_random: Callable[[Any], bool] = lambda sample: False
    # bfloat16 products take factors that were rounded themselves, as torch's do: an element in which they cancel is
    # off by as much as one rounding of the largest.
    rounds_factors: bool = False

    def __str__(self) -> str:
        return self.torch_name


@dataclass
class ModuleInfoEntry:
    """A module of torch's own test database that a module here must replace in full."""

    column: str
    torch_name: str
    module: type[torch.nn.Module]

    def __str__(self) -> str:
        return self.torch_name


def column_modules() -> list[Any]:
    """The case module of every column."""
    return [importlib.import_module(f"{__name__}.{column}") for column in COLUMNS]


def all_cases() -> list[Case]:
    """Every case of every column."""
    return [case for module in column_modules() for case in module.CASES]


def primary_cases() -> list[Case]:
    """The representative cases, for suites that are slow."""
    return [case for case in all_cases() if case.primary]


def operator_samples() -> list[tuple[str, Callable[[], tuple[Any, ...]]]]:
    """(operator name, arguments) for every operator of the library, backward operators too."""
    return [item for module in column_modules() for item in module.OPERATOR_SAMPLES]


def opinfo_entries() -> list[OpInfoEntry]:
    """Every (torch operator, function here) pair to hold against torch's own test database."""
    return [entry for module in column_modules() for entry in module.OPINFO]


def moduleinfo_entries() -> list[ModuleInfoEntry]:
    """Every (torch module, module here) pair to hold against torch's own test database; some columns have none."""
    return [
        ModuleInfoEntry(module.__name__.rpartition(".")[2], name, module_class)
        for module in column_modules()
        for name, module_class in getattr(module, "MODULEINFO", [])
        if hasattr(torch.nn, name.removeprefix("nn."))
    ]


@contextlib.contextmanager
def skipped_without_reference() -> Iterator[None]:
    """Skips the test where torch's own kernel does not run on this processor: oneDNN's bfloat16 LSTM needs AVX-512."""
    try:
        yield
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        pytest.skip("torch's own bfloat16 kernel does not run on this processor")


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors of a result, flattened."""
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


def call(function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Tensors that ``function`` returns for ``sample``."""
    return outputs_of(function(*sample.args, **sample.kwargs))


def gradients(outputs: list[Tensor], sample: Sample, grad_outputs: list[Tensor] | None = None) -> list[Tensor]:
    """Gradients of the differentiable arguments for fixed random ``grad_outputs``; zeros where unused."""
    differentiable_outputs = [o for o in outputs if o.requires_grad]
    if grad_outputs is None:
        grad_outputs = random_like(differentiable_outputs)
    inputs = [sample.args[i] for i in sample.differentiable()]
    return list(
        torch.autograd.grad(differentiable_outputs, inputs, grad_outputs, allow_unused=True, materialize_grads=True)
    )


def random_like(tensors: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Fixed normal values of the given shapes, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in tensors]


def normal(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Fixed normal values, drawn in float64 and cast."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(_devices[-1], dtype)
