"""Any PyTorch code on our kernels, unchanged: ``with dlkernels.override() as log:``.

torch asks a mode on the thread's stack before it computes one of its functions. Ours answers for the functions that are
one of our operations, whatever they were called through, and lets all others pass.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.overrides import TorchFunctionMode

from . import functional
from .info import build_facts
from .operations import chosen_operations
from .ops.registration import in_transform
from .ops.special_calls import subclass_for_torch

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("meta",) if build_facts().get("cuda") is None else ("meta", "cuda")  # beside the processor

_COUNTING = threading.Lock()
_is_compiling = torch.compiler.is_dynamo_compiling

# What a function of ours says when it cannot take a call. torch is asked then, and has the last word on what is wrong.
_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _cross_entropy_loss(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    name = ("none", "mean", "sum")[reduction]
    return functional.cross_entropy(
        self, target, weight, ignore_index=ignore_index, reduction=name, label_smoothing=label_smoothing
    )


def _times_matrix(input: Tensor, matrix: Tensor) -> Tensor:
    return functional.linear(input, matrix.t())


def _is_times_matrix(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a product is a linear layer: rows of features times one matrix."""
    if len(args) != 2 or kwargs or not (isinstance(args[0], Tensor) and isinstance(args[1], Tensor)):
        return False
    return args[0].dim() >= 2 and args[1].dim() == 2


def _is_of_matrices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The same for ``mm``, which takes two dimensions only."""
    return _is_times_matrix(args, kwargs) and args[0].dim() == 2


def _times_matrix_plus_bias(bias: Tensor, input: Tensor, matrix: Tensor) -> Tensor:
    return functional.linear(input, matrix.t(), bias)


def _is_times_matrix_plus_bias(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 1 and _is_of_matrices(args[1:], kwargs)


class _Entry(NamedTuple):
    """One function of torch that is an operation of ours."""

    operation: str
    function: Callable[..., Any] | None  # ours, with torch's signature; None for what only calls operations
    # Of the arguments, where only some calls of torch's function are the operation.
    applies: Callable[[tuple[Any, ...], dict[str, Any]], bool] | None = None


_ENTRIES: dict[Callable[..., Any], _Entry] = {
    torch.conv2d: _Entry("conv2d", functional.conv2d),
    torch_functional.batch_norm: _Entry("batch_norm", functional.batch_norm),
    torch.batch_norm: _Entry("batch_norm", _batch_norm),
    torch.lstm: _Entry("lstm", functional.lstm),
    torch.lstm_cell: _Entry("lstm", functional.lstm_cell),
    torch_functional.linear: _Entry("linear", functional.linear),
    torch.matmul: _Entry("linear", _times_matrix, _is_times_matrix),
    torch.mm: _Entry("linear", _times_matrix, _is_of_matrices),
    torch.addmm: _Entry("linear", _times_matrix_plus_bias, _is_times_matrix_plus_bias),
    Tensor.matmul: _Entry("linear", _times_matrix, _is_times_matrix),
    Tensor.__matmul__: _Entry("linear", _times_matrix, _is_times_matrix),
    Tensor.mm: _Entry("linear", _times_matrix, _is_of_matrices),
    Tensor.addmm: _Entry("linear", _times_matrix_plus_bias, _is_times_matrix_plus_bias),
    torch_functional.cross_entropy: _Entry("cross_entropy", functional.cross_entropy),
    torch._C._nn.cross_entropy_loss: _Entry("cross_entropy", _cross_entropy_loss),  # type: ignore[attr-defined]
    torch_functional.scaled_dot_product_attention: _Entry("attention", functional.scaled_dot_product_attention),
}
if hasattr(torch_functional, "linear_cross_entropy"):  # torch 2.13
    _ENTRIES[torch_functional.linear_cross_entropy] = _Entry("linear_cross_entropy", functional.linear_cross_entropy)

# Functions of torch in Python that call some of the above, or code of the user's that does: recomputation under
# activation checkpointing is part of backward. The mode stays on inside them.
_CALLER = _Entry("", None)
for _function in (
    torch_functional.multi_head_attention_forward,
    Tensor.backward,
    torch.autograd.backward,
    torch.autograd.grad,
):
    _ENTRIES[_function] = _CALLER
_redispatch = getattr(torch.overrides, "redispatch_function", None)  # torch 2.13


class Fallback(NamedTuple):
    """Calls of an operation that torch computed."""

    operation: str
    reason: str
    count: int  # type: ignore[assignment]


class override(contextlib.ContextDecorator, TorchFunctionMode):
    """Runs every call of our operations on our kernels, whatever PyTorch code makes it.

    ``with dlkernels.override() as log:`` around any code, or ``@dlkernels.override()`` on a function. Inside, the
    functions of ``torch``, ``torch.nn.functional``, of tensors and of modules that are one of our operations run here,
    forward and backward; a product with one matrix (``x @ w``, ``mm``, ``addmm`` with a bias) is a linear layer.
    Nothing is patched, and other threads are not touched. What cannot run here goes to torch as it was called, with
    torch's results and torch's errors. Of nested overrides the innermost decides. Calls of dlkernels' own functions and
    modules need no override and are not counted.

    - Under ``torch.compile`` a function is compiled for the inside apart from the outside, whole, and once. Compiled
      calls are not counted, and ``multi_head_attention_forward`` stays torch's: :func:`dlkernels.convert` reaches it.
    - Activation checkpointing computes again in backward: call ``backward`` inside too.
    - torch leaves its fused inference paths (``nn.MultiheadAttention``, ``nn.TransformerEncoder``) while any mode is
      on. Without them padded positions hold what the layers compute, as in training, in place of zeros.
    - Where torch lacks ``torch.overrides.redispatch_function`` (before 2.13) nothing is taken in backward and inside
      ``multi_head_attention_forward``.

    Args:
        ops: the operations to take, by name; all by default: ``"conv2d"``, ``"batch_norm"``, ``"lstm"``, ``"linear"``,
            ``"cross_entropy"``, ``"linear_cross_entropy"``, ``"attention"``.
        skip: operations to leave to torch.

    Attributes:
        calls: number of calls that ran here, by operation. Printing the override gives a table of these and
            :attr:`fallbacks`.

    Raises:
        ValueError: ``ops`` or ``skip`` names something that is not an operation.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> labels = torch.tensor([0, 1, 1, 0])
        >>> with override() as log:
        ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 8)), labels)
        ...     loss.backward()
        >>> print(log)
        operation      calls  where
        cross_entropy      1  here
        linear             2  here
    """

    def __init__(self, ops: Iterable[str] | None = None, skip: Iterable[str] = ()) -> None:
        self._operations = dict.fromkeys(chosen_operations(ops, skip))  # no set: torch.compile guards dicts only
        self.calls: dict[str, int] = {}
        self._fallbacks: dict[tuple[str, str], int] = {}

    @property
    def fallbacks(self) -> list[Fallback]:
        """Calls that went to torch: ``(operation, reason, count)``."""
        return [Fallback(*key, count) for key, count in self._fallbacks.items()]

    def __str__(self) -> str:
        rows = [(operation, str(count), "here") for operation, count in self.calls.items()]
        rows += [(operation, str(count), f"torch: {reason}") for operation, reason, count in self.fallbacks]
        if not rows:
            return "no calls"
        rows = [("operation", "calls", "where"), *sorted(rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{name:<{widths[0]}}  {count:>{widths[1]}}  {where}" for name, count, where in rows)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        entry = _ENTRIES.get(function)
        if entry is None:
            return function(*args, **kwargs) if kwargs else function(*args)
        kwargs = kwargs or {}
        operation, ours, applies = entry
        if ours is None:
            return self._call_with_mode(function, types, args, kwargs)
        if operation not in self._operations or not (applies is None or applies(args, kwargs)):
            return _call_torch(function, args, kwargs)
        reason = _obstacle(operation, types, args, kwargs)
        if reason is None:
            try:
                result = ours(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except _REFUSALS as refusal:
                reason = _first_sentence(str(refusal))
            else:
                self._count(self.calls, operation)
                return result
        result = _call_torch(function, args, kwargs)
        self._count(self._fallbacks, (operation, reason))
        return result

    def _call_with_mode(self, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a function of torch in Python so that the calls inside come here."""
        if function is torch_functional.multi_head_attention_forward and "attention" in self._operations:
            if _redispatch is None:
                self._count(self._fallbacks, ("attention", "inside multi_head_attention_forward before torch 2.13"))
            elif args[15] if len(args) > 15 else kwargs.get("need_weights", True):
                self._count(self._fallbacks, ("attention", "need_weights=True, for which torch takes other steps"))
        if _redispatch is None or _is_compiling():  # torch.compile has no such way around itself
            return function(*args, **kwargs)
        with self:
            return _redispatch(function, types, args, kwargs)

    def _count(self, counts: dict[Any, int], key: Any) -> None:
        if not _is_compiling():  # a count in a graph would be a constant to compile again for
            with _COUNTING:
                counts[key] = counts.get(key, 0) + 1


def _first_sentence(text: str) -> str:
    return re.split(r"\. |\n", text, maxsplit=1)[0]


def _obstacle(operation: str, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a call cannot run here, as far as that can be told before it."""
    for kind in types:
        if kind is not Tensor:
            return f"tensors of type {kind.__name__}"
    if in_transform():
        return "inside a transform of torch.func"
    subclass = subclass_for_torch(operation, _flattened((*args, *kwargs.values())))
    if subclass is not None:
        return f"tensors of type {subclass.__name__}"
    tensor = args[0] if args else kwargs.get("input", kwargs.get("query"))
    if not isinstance(tensor, Tensor):
        return None  # ours to refuse, as everything that is not asked here
    if tensor.dtype not in _DTYPES:
        return f"type {tensor.dtype}"
    if not tensor.is_cpu and tensor.device.type not in _DEVICES:
        return f"device {tensor.device.type}"
    return None


def _flattened(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and in place of lists and tuples what is in them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    modes = [torch.overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())][::-1]
    others = [mode for mode in modes if not isinstance(mode, override)]
    for mode in others:
        torch.overrides._push_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            torch.overrides._pop_mode()
        for mode in modes:
            torch.overrides._push_mode(mode)


def _call_torch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls ``function`` past the overrides around this one, which has decided."""
    if torch._C._len_torch_function_stack() == 0:
        return function(*args, **kwargs)
    with _without_overrides():
        return function(*args, **kwargs)
