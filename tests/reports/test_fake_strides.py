"""Kind: a fake tensor whose shape, strides or type are not those of the kernel's result. ``torch.compile`` builds on
them; every operator that a call runs, forward, backward and once more backward, is held to its fake over random
layouts of its arguments."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dlkernels import functional


def meaningful_strides(tensor: Tensor) -> list[int]:
    """Those that lead from one element to another."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and tensor.numel()]


def facts(value: Any) -> list[tuple[Any, ...] | None]:
    leaves = tree_leaves(value, is_leaf=lambda leaf: leaf is None)
    return [
        (tuple(v.shape), meaningful_strides(v), v.dtype, v.storage_offset()) if isinstance(v, Tensor) else None
        for v in leaves
    ]


class HeldToFakes(TorchDispatchMode):
    """Runs every operator of the package a second time on fakes of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "dlkernels":
            self.seen.add(func._schema.name.removeprefix("dlkernels::"))
            with self.fakes:
                fake_args, fake_kwargs = tree_map_only(Tensor, self.fakes.from_tensor, (args, kwargs or {}))
                fake = func(*fake_args, **fake_kwargs)
            given = [(tuple(a.shape), a.stride()) for a in tree_leaves(args) if isinstance(a, Tensor)]
            assert facts(fake) == facts(result), f"{func} of {given}"
        return result


def laid(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same values with other strides."""
    dims = tensor.dim()
    kind = rng.choice(
        ["plain", "permuted", "pixels first", "sliced", "expanded", "channels_last", "odd ones", "transposed", "padded"]
    )
    if tensor.numel() == 0 or dims == 0:
        return tensor
    if kind in ("permuted", "pixels first"):
        order = rng.sample(range(dims), dims) if kind == "permuted" else list(range(dims))[::-1]
        if kind == "pixels first" and dims > 3:
            order = [*range(2, dims), 1, 0]
        return tensor.permute(order).contiguous().permute([order.index(d) for d in range(dims)])
    if kind == "sliced":
        d = rng.randrange(dims)
        return tensor.repeat_interleave(2, d)[(slice(None),) * d + (slice(None, None, 2),)]
    if kind == "expanded":
        d = rng.randrange(dims)
        return tensor.narrow(d, 0, 1).expand(tensor.shape)
    if kind == "channels_last" and dims in (4, 5):
        return tensor.to(memory_format=torch.channels_last if dims == 4 else torch.channels_last_3d)
    if kind == "odd ones":  # a stride means nothing where there is one element
        strides = [rng.choice([s, 1, 7, 1000]) if n == 1 else s for n, s in zip(tensor.shape, tensor.stride())]  # noqa: B905
        return tensor.contiguous().as_strided(tensor.shape, strides)
    if kind == "transposed" and dims >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "padded":
        return torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]
    return tensor


def sizes(rng: random.Random, *choices: tuple[int, ...]) -> list[int]:
    return [rng.choice(c) for c in choices]


Call = tuple[Callable[..., Any], list[Tensor | None]]
FEW = (1, 1, 2, 3)


def batch_norm(rng: random.Random) -> Call:
    N, C = sizes(rng, FEW, (1, 2, 5))
    x = torch.randn(N + 1 if rng.random() < 0.5 else N, C, *sizes(rng, *[(1, 2, 3, 7)] * rng.randrange(4)))
    training = x.numel() > C and rng.random() < 0.7
    activation = rng.choice([None, "relu", "relu6"])
    running = [torch.zeros(C), torch.ones(C)] if not training or rng.random() < 0.5 else [None, None]
    residual = torch.randn(x.shape) if rng.random() < 0.4 else None

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        types = [r if r is None else r.to(x.dtype) for r in running]
        return functional.batch_norm(
            x, *types, weight, bias, training, 0.1, 1e-5, activation=activation, residual=residual
        )

    return call, [x, torch.randn(C), torch.randn(C), residual]


def conv2d(rng: random.Random) -> Call:
    groups = rng.choice([1, 1, 2])
    N, C, K, H, W = sizes(rng, FEW, (1, 2), (1, 2, 3), (1, 2, 5), (1, 2, 5))
    kernel = sizes(rng, (1, 2, 3), (1, 2, 3))
    stride, dilation = rng.choice([1, 2, 10**6]), rng.choice([1, 2])
    padding = rng.choice([2, 4, 10**6 if stride > 2 else 4])
    x, w = torch.randn(N, C * groups, H, W), torch.randn(K * groups, C, *kernel)
    bias = torch.randn(K * groups) if rng.random() < 0.5 else None
    return lambda x, w, b: functional.conv2d(x, w, b, stride, padding, dilation, groups), [x, w, bias]


def linear(rng: random.Random) -> Call:
    *rows, features, outputs = sizes(rng, *[(1, 2, 3, 0)] * rng.randrange(3), (1, 4), (1, 5))
    bias = torch.randn(outputs) if rng.random() < 0.5 else None
    return functional.linear, [torch.randn(*rows, features), torch.randn(outputs, features), bias]


def cross_entropy(rng: random.Random) -> Call:
    N, C = sizes(rng, FEW, (1, 4))
    shape = [N, C, *sizes(rng, *[(1, 2, 3)] * rng.randrange(3))] if rng.random() < 0.8 else [C]
    reduction = rng.choice(["none", "mean", "sum"])
    x, weight = torch.randn(shape), torch.rand(C) if rng.random() < 0.5 else None
    if rng.random() < 0.4:
        share = torch.rand(shape).softmax(-1)
        return lambda x, t: functional.cross_entropy(x, t, weight.to(x.dtype) if weight is not None else None), [
            x,
            share,
        ]
    target = torch.randint(0, C, [s for d, s in enumerate(shape) if d != (1 if len(shape) > 1 else 0)])
    target = laid(target, rng)
    return (
        lambda x: functional.cross_entropy(
            x, target, weight.to(x.dtype) if weight is not None else None, reduction=reduction
        ),
        [x],
    )


def linear_cross_entropy(rng: random.Random) -> Call:
    N, features, C = sizes(rng, (1, 3), (1, 4), (1, 5))
    reduction = rng.choice(["none", "mean", "sum"])
    bias = torch.randn(C) if rng.random() < 0.5 else None
    x = torch.randn(N, features) if rng.random() < 0.8 else torch.randn(features)
    target = laid(torch.randint(0, C, x.shape[:-1]), rng)
    return (
        lambda x, w, b: functional.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction),
        [x, torch.randn(C, features), bias],
    )


def lstm(rng: random.Random) -> Call:
    T, N, features, H = sizes(rng, (1, 3), (1, 2), (1, 3), (2, 4))
    projection, both, layers = rng.choice([0, 1]), rng.random() < 0.5, rng.choice([1, 2])
    batch_first = rng.random() < 0.5
    directions, outputs = 2 if both else 1, projection or H
    weights: list[Tensor | None] = []
    for layer in range(layers):
        inputs = features if layer == 0 else outputs * directions
        for _ in range(directions):
            weights += [torch.randn(4 * H, inputs), torch.randn(4 * H, outputs), torch.randn(4 * H), torch.randn(4 * H)]
            weights += [torch.randn(projection, H)] if projection else []
    shape = [N, T] if batch_first else [T, N]
    states = [torch.randn(layers * directions, N, n) for n in (outputs, H)]

    def call(x: Tensor, h: Tensor, c: Tensor, *flat: Tensor) -> Any:
        return functional.lstm(x, (h, c), flat, True, layers, 0.0, False, both, batch_first)

    return call, [torch.randn(*shape, features), *states, *weights]


def lstm_cell(rng: random.Random) -> Call:
    N, features, H = sizes(rng, (1, 3), (1, 2), (1, 4))
    shapes = [(N, features), (N, H), (N, H), (4 * H, features), (4 * H, H), (4 * H,), (4 * H,)]
    return lambda x, h, c, *w: functional.lstm_cell(x, (h, c), *w), [torch.randn(s) for s in shapes]


def attention(rng: random.Random) -> Call:
    N, heads, L, S, E, V = sizes(rng, (1, 2), (1, 3), (1, 4), (1, 5), (1, 8), (1, 8))
    batch = [[], [heads], [N, heads]][rng.randrange(3)]
    mask = torch.randn(L, S) if rng.random() < 0.4 else None
    shapes = [[*batch, L, E], [*batch, S, E], [*batch, S, V]]
    return functional.scaled_dot_product_attention, [*map(torch.randn, shapes), mask]


OPERATIONS: dict[Callable[[random.Random], Call], set[str]] = {
    attention: {"attention", "attention_backward"},
    batch_norm: {"batch_norm", "batch_norm_backward", "update_running_statistics_"},
    conv2d: {"conv2d", "conv2d_backward"},
    cross_entropy: {"cross_entropy", "cross_entropy_backward"},
    linear: {"linear", "linear_backward"},
    linear_cross_entropy: {"linear_cross_entropy", "linear_cross_entropy_backward"},
    lstm: {"lstm_layer", "lstm_layer_backward"},
    lstm_cell: {"lstm_cell", "lstm_cell_backward"},
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_fakes_are_like_what_kernels_return(operation: Callable[[random.Random], Call]) -> None:
    seen: set[str] = set()
    for seed in range(8 if operation is lstm else 24):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        call, values = operation(rng)
        leaves = [
            v if v is None else laid(v.to(dtype), rng).detach().requires_grad_(rng.random() < 0.8) for v in values
        ]
        with HeldToFakes() as held:
            outputs = [o for o in tree_leaves(call(*leaves)) if o.requires_grad]
            wanted = [v for v in leaves if v is not None and v.requires_grad]
            cotangents = [laid(torch.randn_like(o), rng) for o in outputs]
            if outputs:
                first = torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True)
                first = [g for g in first if g is not None and g.requires_grad]
                if first:
                    torch.autograd.grad(
                        first, wanted, [laid(torch.randn_like(g), rng) for g in first], allow_unused=True
                    )
        seen |= held.seen
    assert seen >= OPERATIONS[operation]


@pytest.mark.parametrize(
    "shape", [(1, 5, 4, 3), (2, 1, 4, 3), (1, 1, 4, 3), (2, 3, 1, 1), (1, 3, 1, 4), (1, 3, 2, 2, 2)]
)
def test_fakes_of_every_order_of_memory(shape: tuple[int, ...]) -> None:
    """Where a dimension has one element, more than one memory format may fit, and who asks decides which."""
    dims = len(shape)
    for order in itertools.permutations(range(dims)):
        x = torch.randn([shape[d] for d in order]).permute([order.index(d) for d in range(dims)]).requires_grad_()
        with HeldToFakes():
            weight, bias = torch.ones(shape[1], requires_grad=True), torch.zeros(shape[1], requires_grad=True)
            functional.batch_norm(x, None, None, weight, bias, training=True).square().sum().backward()
            if dims == 4:
                kernel = torch.randn(2, shape[1], 1, 2, requires_grad=True)
                functional.conv2d(x, kernel, padding=1).square().sum().backward()


def hwc_image() -> Tensor:
    """One image whose channels lie innermost, seen as a batch: both layouts at once to some who ask."""
    return torch.randn(24, 33, 11).unsqueeze(-1).permute(3, 2, 0, 1)


def test_compiled_batch_norm_of_one_hwc_image() -> None:
    weight, bias = torch.randn(11, requires_grad=True), torch.randn(11, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return functional.batch_norm(x, torch.zeros(11), torch.ones(11), weight, bias, training=True).relu() * 2

    x = hwc_image().requires_grad_()
    compiled = torch.compile(forward, fullgraph=True)(x)
    expected = forward(x)
    assert compiled.stride() == expected.stride()
    torch.testing.assert_close(compiled, expected)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.square().sum(), (x, weight, bias)),
        torch.autograd.grad(expected.square().sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
