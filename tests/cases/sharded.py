"""Tensors that two processes share, for ``reports/test_sharded_tensors.py``: what each rank found goes to a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dlkernels
from dlkernels import functional as F

from . import outputs_of

Call = Callable[..., Any]


def values(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


CLASSES = torch.tensor([0, 2, 1, 2])


def losses(function: Call, reduction: str) -> Call:
    return lambda logits, classes: function(logits, classes, reduction=reduction)


def norms(function: Call, training: bool) -> Call:
    return lambda x, mean, var, weight, bias: function(x, mean, var, weight, bias, training)


def sequences(function: Call) -> Call:
    return lambda x, h, c, *params: function(x, (h, c), params, True, 1, 0.0, True, False, False)


T = torch.nn.functional
NORMED = [*values((4, 6, 3, 2), (6,)), values((6,))[0].square().add(0.5), *values((6,), (6,))]
HEADS = values((4, 2, 5, 8), (4, 2, 7, 8), (4, 2, 7, 6))
LSTM = values((3, 4, 5), (1, 4, 6), (1, 4, 6), (24, 5), (24, 6), (24,), (24,))

# Name: ours, torch's, arguments, and by argument the dimension that is cut (None: every rank has the whole).
FUNCTIONS: dict[str, tuple[Call, Call, list[Tensor], list[list[int | None]]]] = {
    "linear": (
        F.linear,
        T.linear,
        values((4, 3, 6), (8, 6), (8,)),
        [[None] * 3, [0, None, None], [1, None, None], [None, 0, 0], [2, 1, None], [0, 0, None], [None, 1, 0]],
    ),
    "linear without bias": (F.linear, T.linear, values((4, 6), (8, 6)), [[0, None], [None, 0], [1, 1]]),
    "conv2d": (
        F.conv2d,
        T.conv2d,
        values((4, 6, 5, 5), (2, 6, 3, 3), (2,)),
        [[None] * 3, [0, None, None], [None, 0, 0], [1, 1, None]],
    ),
    "batch_norm": (
        norms(F.batch_norm, False),
        norms(T.batch_norm, False),
        NORMED,
        [[None] * 5, [0, *[None] * 4], [1, *[0] * 4]],
    ),
    "batch_norm, training": (
        norms(F.batch_norm, True),
        norms(T.batch_norm, True),
        NORMED,
        [[None] * 5, [0, *[None] * 4], [1, *[0] * 4]],
    ),
    "attention": (
        F.scaled_dot_product_attention,
        T.scaled_dot_product_attention,
        HEADS,
        [[None] * 3, [0] * 3, [1] * 3, [0, None, None]],
    ),
    "attention with a mask": (
        F.scaled_dot_product_attention,
        T.scaled_dot_product_attention,
        [*HEADS, *values((4, 1, 5, 7))],
        [[None] * 4, [0] * 4, [1, 1, 1, None]],
    ),
    "cross_entropy, mean": (
        losses(F.cross_entropy, "mean"),
        losses(T.cross_entropy, "mean"),
        [*values((4, 3)), CLASSES],
        [[None] * 2, [0, 0]],
    ),
    "cross_entropy, none": (
        losses(F.cross_entropy, "none"),
        losses(T.cross_entropy, "none"),
        [*values((4, 3)), CLASSES],
        [[None] * 2, [0, 0]],
    ),
    "linear_cross_entropy": (
        F.linear_cross_entropy,
        lambda x, w, t: T.cross_entropy(T.linear(x, w), t),
        [*values((4, 6), (3, 6)), CLASSES],
        [[None] * 3, [0, None, 0]],
    ),
    "lstm": (sequences(F.lstm), sequences(torch._VF.lstm), LSTM, [[None] * 7, [1, *[None] * 6]]),
}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def fresh(arguments: list[Tensor]) -> list[Tensor]:
    return [argument.detach().clone() for argument in arguments]


@contextlib.contextmanager
def operators() -> Iterator[set[str]]:
    """The namespaces of the operators that are called inside."""
    seen: set[str] = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if DTensor in types or any(isinstance(a, DTensor) for a in args):
                seen.add(func.namespace)
            return func(*args, **kwargs or {})

    with Watch():
        yield seen


def found(name: str, cut: list[int | None], mesh: Any) -> dict[str, Any]:
    ours, torchs, arguments, _ = FUNCTIONS[name]
    frozen = {1, 2} if name.startswith("batch_norm") else set()  # running statistics
    plain = fresh(arguments)
    shared = [
        distribute_tensor(argument, mesh, [Replicate() if dim is None else Shard(dim)])
        for argument, dim in zip(fresh(arguments), cut, strict=True)
    ]

    def call(function: Call, given: list[Tensor]) -> list[Tensor]:
        leaves = [a if i in frozen or not a.is_floating_point() else a.requires_grad_() for i, a in enumerate(given)]
        outputs = outputs_of(function(*leaves))
        total = sum(((output * (1 + output)).sum() for output in outputs), 0)
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        statistics = [given[i] for i in sorted(frozen)]
        return [whole(t) for t in (*outputs, *(g for g in grads if g is not None), *statistics)]

    expected = call(torchs, plain)
    with operators() as seen:
        results = call(ours, shared)
    torch.testing.assert_close(results, expected)
    with CommDebugMode() as communication, torch.no_grad():
        ours(*shared)
    return {"ours": "dlkernels" in seen, "collectives": communication.get_total_counts()}


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).double()


def parallelised(mesh: Any, converted: str) -> None:
    """ColwiseParallel and RowwiseParallel of a model that is converted before or after."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    (x,) = values((5, 6))
    plain = network()
    expected = plain(x)
    expected.square().sum().backward()
    model = network()
    if converted == "before":
        dlkernels.convert(model)
    parallelize_module(model, mesh, plan)
    if converted == "after":
        dlkernels.convert(model)
    if converted == "override":
        with dlkernels.override():
            output = model(x)
    else:
        assert type(model[0]) is dlkernels.nn.Linear
        output = model(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(whole(own.grad), other.grad)


def mixed(mesh: Any) -> None:
    """A DTensor beside a plain tensor is refused, as torch refuses it."""
    x, weight = values((4, 6), (8, 6))
    shared = distribute_tensor(x, mesh, [Shard(0)])
    for function in (T.linear, F.linear):
        with pytest.raises(RuntimeError, match="mixed"):
            function(shared, weight)


def half_types(mesh: Any) -> None:
    tensors = values((4, 2, 5, 8), (4, 2, 7, 8), (4, 2, 7, 8), dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(*tensors)
    for dim in (0, 1):
        shared = [distribute_tensor(t, mesh, [Shard(dim)]) for t in tensors]
        assert torch.equal(whole(F.scaled_dot_product_attention(*shared)), expected)


def answer(check: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return check(*arguments) or {}
    except Exception as error:  # every check is asked, on both ranks alike
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def compute() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    results = {f"{name} {cut}": answer(found, name, cut, mesh) for name, entry in FUNCTIONS.items() for cut in entry[3]}
    for when in ("before", "after", "override"):
        results[f"parallelised, converted {when}"] = answer(parallelised, mesh, when)
    results["mixed"] = answer(mixed, mesh)
    results["half types"] = answer(half_types, mesh)
    return results


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = compute()
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
