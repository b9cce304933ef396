"""What our operators do with ``torch.distributed.tensor.DTensor``: which placements of arguments give which of results.

Imported together with that module. Each rule says for one dimension of a mesh what every rank can compute of its own
part; DTensor moves arguments that lie otherwise. Batches are cut everywhere but in losses and LSTMs, linear layers and
convolutions also by outputs ("colwise") and inputs ("rowwise"), attention by heads, batch norm by channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_OPS = torch.ops.dlkernels
_Rule = tuple[list[Any], list[Any]]  # placements of the results and of the arguments, None for what is no tensor


def runs_here(operation: str, tensors: Sequence[Tensor]) -> bool:
    """Whether a call with these arguments, some of which are DTensors, is for our operators.

    torch's have rules of their own for losses (``loss_parallel``), for images that are cut in height or width and for
    sequences that are cut in time (``context_parallel``); they also say what is wrong with a mixture.
    """
    if operation not in _CUT or not all(isinstance(tensor, DTensor) for tensor in tensors):
        return False
    return all(
        placement.dim in _CUT[operation](tensor)
        for tensor in tensors
        for placement in tensor.placements  # type: ignore[attr-defined]
        if isinstance(placement, Shard)
    )


# By operation: the dimensions in which an argument may be cut.
_CUT: dict[str, Callable[[Tensor], Sequence[int]]] = {
    "linear": lambda tensor: range(tensor.dim()),
    "conv2d": lambda tensor: (0, 1),
    "batch_norm": lambda tensor: (0, 1),
    "attention": lambda tensor: range(tensor.dim() - 2),
    "lstm": lambda tensor: range(tensor.dim()),
}


def _rules_of(operator: Any) -> Callable[[Callable[..., list[_Rule]]], Callable[..., list[_Rule]]]:
    """Registers the decorated function, which is given the operator's arguments and returns what may be cut, beside the
    rule that every rank computes the whole."""

    def decorate(rules: Callable[..., list[_Rule]]) -> Callable[..., list[_Rule]]:
        results = len(operator._schema.returns)

        def complete(*arguments: Any) -> list[_Rule]:
            whole: list[Any] = [Replicate() if hasattr(value, "placements") else None for value in arguments]
            found = [([Replicate()] * results, whole), *rules(*arguments)]
            # An argument that is absent has no placement, whatever the rule says.
            return [
                (outputs, [place if known else None for place, known in zip(places, whole, strict=True)])
                for outputs, places in (
                    (outputs, [*places, *[None] * (len(whole) - len(places))]) for outputs, places in found
                )
            ]

        register_sharding(operator)(complete)
        _depend_on_all_arguments(operator)
        return rules

    return decorate


def _depend_on_all_arguments(operator: Any) -> None:
    """torch keeps a rule's answer by the tensors and integers of a call; ours depend on flags and masks too."""
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    tensors = (torch._C.TensorType.get(), torch._C.OptionalType(torch._C.TensorType.get()))
    arguments = operator._schema.arguments
    first = next((i for i, argument in enumerate(arguments) if argument.type not in tensors), len(arguments))
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.op_to_schema_info[operator] = RuntimeSchemaInfo(first, needs_pytree=True)


@_rules_of(_OPS.linear.default)
def _linear(input: Any, weight: Any, bias: Any) -> list[_Rule]:
    last = input.ndim - 1
    rows: list[_Rule] = [([Shard(d)], [Shard(d), Replicate(), Replicate()]) for d in range(last)]
    outputs: _Rule = ([Shard(last)], [Replicate(), Shard(0), Shard(0)])
    inputs: _Rule = ([Partial()], [Shard(last), Shard(1), Partial()])
    return [*rows, outputs, inputs]


@_rules_of(_OPS.linear_backward.default)
def _linear_backward(grad_output: Any, input: Any, weight: Any, output_mask: Any) -> list[_Rule]:
    last = input.ndim - 1
    rows: list[_Rule] = [([Shard(d), Partial(), Partial()], [Shard(d), Shard(d), Replicate()]) for d in range(last)]
    outputs: _Rule = ([Partial(), Shard(0), Shard(0)], [Shard(last), Replicate(), Shard(0)])
    inputs: _Rule = ([Shard(last), Shard(1), Replicate()], [Replicate(), Shard(last), Shard(1)])
    return [*rows, outputs, inputs]


@_rules_of(_OPS.conv2d.default)
def _conv2d(input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> list[_Rule]:
    images: _Rule = ([Shard(0)], [Shard(0), Replicate(), Replicate()])
    outputs: _Rule = ([Shard(1)], [Replicate(), Shard(0), Shard(0)])
    inputs: _Rule = ([Partial()], [Shard(1), Shard(1), Partial()])
    return [images, outputs, inputs] if groups == 1 else [images]


@_rules_of(_OPS.conv2d_backward.default)
def _conv2d_backward(
    grad_output: Any, input: Any, weight: Any, stride: Any, padding: Any, dilation: Any, groups: int, output_mask: Any
) -> list[_Rule]:
    images: _Rule = ([Shard(0), Partial(), Partial()], [Shard(0), Shard(0), Replicate()])
    outputs: _Rule = ([Partial(), Shard(0), Shard(0)], [Shard(1), Replicate(), Shard(0)])
    inputs: _Rule = ([Shard(1), Shard(1), Replicate()], [Replicate(), Shard(1), Shard(1)])
    return [images, outputs, inputs] if groups == 1 else [images]


@_rules_of(_OPS.batch_norm.default)
def _batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    eps: float,
    activation: str | None,
) -> list[_Rule]:
    of_channels = Shard(0)
    channels: _Rule = (
        [Shard(1), of_channels, of_channels],
        [Shard(1), of_channels, of_channels, Shard(1), of_channels, of_channels],
    )
    if training:
        return [channels]
    whole = Replicate()
    return [channels, ([Shard(0), whole, whole], [Shard(0), whole, whole, Shard(0), whole, whole])]


@_rules_of(_OPS.batch_norm_backward.default)
def _batch_norm_backward(
    grad_output: Any,
    input: Any,
    output: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    *_: Any,
) -> list[_Rule]:
    of_channels = Shard(0)
    channels: _Rule = (
        [Shard(1), of_channels, of_channels, Shard(1)],
        [*[Shard(1)] * 3, *[of_channels] * 4],
    )
    if training:
        return [channels]
    whole = Replicate()
    images: _Rule = (
        [Shard(0), Partial(), Partial(), Shard(0)],
        [*[Shard(0)] * 3, *[whole] * 4],
    )
    return [channels, images]


@_rules_of(_OPS.update_running_statistics_.default)
def _update_running_statistics(*_: Any) -> list[_Rule]:
    return [([], [Shard(0)] * 4)]


def _cut_of_mask(mask: Any, query: Any, dimension: int) -> Any:
    """How the mask lies where ``query`` is cut in ``dimension``: whole where it is broadcast."""
    if mask is None:
        return Replicate()
    own = dimension - (query.ndim - mask.ndim)
    return Replicate() if own < 0 or mask.shape[own] == 1 else Shard(own)


def _batch_dimensions(query: Any, key: Any, value: Any, dropout_p: float) -> list[int]:
    """Where attention can be cut: nothing is broadcast, nothing shared between heads, no mask drawn for all."""
    if dropout_p > 0 or not query.ndim == key.ndim == value.ndim:
        return []
    return [d for d in range(query.ndim - 2) if query.shape[d] == key.shape[d] == value.shape[d]]


def _cut_of_exact_output(query: Any, dimension: int) -> Any:
    """Half types have one, shaped as the output."""
    return Shard(dimension) if query.tensor_meta.dtype in (torch.bfloat16, torch.float16) else Replicate()


@_rules_of(_OPS.attention.default)
def _attention(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, *_: Any) -> list[_Rule]:
    return [
        (
            [Shard(d), _cut_of_exact_output(query, d), Shard(d + 1), Replicate()],
            [Shard(d), Shard(d), Shard(d), _cut_of_mask(attn_mask, query, d)],
        )
        for d in _batch_dimensions(query, key, value, dropout_p)
    ]


@_rules_of(_OPS.attention_backward.default)
def _attention_backward(
    grad_output: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    output: Any,
    exact_output: Any,
    statistics: Any,
    dropout_seed: Any,
    dropout_p: float,
    *_: Any,
) -> list[_Rule]:
    rules: list[_Rule] = []
    for d in _batch_dimensions(query, key, value, dropout_p):
        cut = Shard(d)
        mask = _cut_of_mask(attn_mask, query, d)
        results = [cut, cut, cut, Partial() if isinstance(mask, Replicate) else mask]
        saved = [cut, _cut_of_exact_output(query, d), Shard(d + 1), Replicate()]
        rules.append((results, [cut, cut, cut, cut, mask, *saved]))
    return rules


for _operator in ("cross_entropy", "linear_cross_entropy", "lstm_cell", "lstm_layer"):
    for _name in (_operator, f"{_operator}_backward"):
        _rules_of(getattr(_OPS, _name).default)(lambda *_: [])
