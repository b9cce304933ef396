"""Random calls of every operation, beside torch's functions for the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as reference
from torch import Tensor

from dlkernels import functional as ours

from .draw import Draw

Function = Callable[..., Any]


@dataclass
class Call:
    """One call: ``function(*tensors)`` ours and torch's, with everything but the tensors bound."""

    tensors: list[Tensor]  # in float64; cast and laid out by the check
    ours: Function
    reference: Function
    arguments: dict[str, Any]  # what a finding prints
    differentiable: list[int] = field(default_factory=list)
    float32_beside_half: list[int] = field(default_factory=list)  # parameters that stay wide beside a half input
    # The output before an activation that has kinks, from the same tensors, and where they are.
    before_kinks: Function | None = None
    kinks: tuple[float, ...] = ()
    # From the tensors and the gradient of the output: the sums of which gradients consist, of their terms' sizes.
    terms: Callable[[list[Tensor], Tensor], list[Tensor]] | None = None

    def __post_init__(self) -> None:
        self.differentiable = self.differentiable or list(range(len(self.tensors)))


def conv2d(draw: Draw) -> Call:
    """Any groups, stride, padding and dilation; one image without a batch at times."""
    while True:
        depthwise = draw.chance(0.25)
        groups = draw.size(0, large=True) if depthwise else draw.one_of(1, 1, 1, 1, 2, 3, 5, 8)
        in_channels = 1 if depthwise else draw.size(0.01)
        out_channels = draw.one_of(1, 1, 2, 3) if depthwise else draw.size(0)
        batch, height, width = draw.one_of(1, 2, 3, draw.size()), draw.size(0), draw.size(0)
        kernel = draw.one_of((3, 3), (3, 3), (1, 1), (5, 5), (7, 7), (draw.one_of(1, 2, 4), draw.one_of(1, 3, 6)))
        stride = draw.one_of(1, 1, 1, 2, 2, 3, 7, (1, 2), (2, 1), (5, 9))
        dilation = draw.one_of(1, 1, 1, 1, 2, (1, 2), (4, 1), 9)
        padding = draw.one_of(0, 0, 1, 1, 2, (0, 1), (2, 0), "same", "valid", 5, (7, 9))
        if padding == "same":
            stride = 1
        x = torch.empty(batch, groups * in_channels, height, width, device="meta")
        weight = torch.empty(groups * out_channels, in_channels, *kernel, device="meta")
        try:
            products = reference.conv2d(x, weight, None, stride, padding, dilation, groups).numel() * weight[0].numel()
        except RuntimeError:
            products = 0  # an error that ours must raise too
        if products < 6e7 and max(x.numel(), weight.numel()) < 3e6 and (products > 0 or draw.chance(0.05)):
            break
    unbatched = batch == 1 and draw.chance(0.15)
    tensors = [draw.values(*x.shape[1 if unbatched else 0 :]), draw.normal(*weight.shape) * draw.one_of(1.0, 0.1)]
    if draw.chance(0.6):
        tensors.append(draw.normal(weight.shape[0]))

    def bound(function: Function) -> Function:
        return lambda x, w, b=None: function(x, w, b, stride, padding, dilation, groups)

    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return Call(tensors, bound(ours.conv2d), bound(reference.conv2d), arguments)


def batch_norm(draw: Draw) -> Call:
    """Training and evaluation, with and without each argument, with the activation and the residual of our kernel."""
    while True:
        shape = [draw.size(), draw.size(0, large=True), *draw.sizes(draw.one_of(0, 1, 2, 2, 2, 3), 0.01)]
        if math.prod(shape) <= 4e5:
            break
    channels, training = shape[1], draw.chance(0.7)
    activation, residual = draw.one_of(None, None, "relu", "relu6"), draw.chance(0.3)
    has_weight, has_bias, tracks = draw.chance(0.8), draw.chance(0.8), draw.chance(0.7) or not training
    momentum, eps = draw.one_of(0.1, 0.0, 1.0, 0.37), draw.one_of(1e-5, 1e-3, 0.1)
    names = ["input", *["weight"] * has_weight, *["bias"] * has_bias, *["residual"] * residual]
    sizes = {"input": shape, "residual": shape, "weight": [channels], "bias": [channels]}
    mean, variance = draw.normal(channels), draw.uniform(channels) + 0.2
    wide = draw.chance(0.3)

    def statistics(like: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        half = like.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if wide and half else like.dtype
        return (mean.to(dtype), variance.to(dtype)) if tracks else (None, None)

    def run_ours(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        running = statistics(tensors[0])
        y = ours.batch_norm(
            given["input"],
            *running,
            given.get("weight"),
            given.get("bias"),
            training,
            momentum,
            eps,
            activation=activation,
            residual=given.get("residual"),
        )
        return (y, *running) if tracks and training else (y,)

    def before_activation(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        running = statistics(tensors[0])
        scale = given.get("weight"), given.get("bias")
        if not has_weight and has_bias:  # torch has no second derivative of a bias that stands alone
            scale = torch.ones(channels, dtype=scale[1].dtype), scale[1]
        y = reference.batch_norm(given["input"], *running, *scale, training, momentum, eps)
        if residual:
            y = y + given["residual"]
        return (y, *running) if tracks and training else (y,)

    def run_reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, *rest = before_activation(*tensors)
        activations = {None: lambda y: y, "relu": torch.relu, "relu6": reference.relu6}
        return (activations[activation](y), *rest)

    return Call(
        [draw.values(*shape) if name == "input" else draw.normal(*sizes[name]) for name in names],
        run_ours,
        run_reference,
        {
            "tensors": names,
            "training": training,
            "activation": activation,
            "momentum": momentum,
            "eps": eps,
            "running": tracks,
        },
        float32_beside_half=[i for i, name in enumerate(names) if wide and name in ("weight", "bias")],
        before_kinks=before_activation if activation else None,
        kinks={None: (), "relu": (0.0,), "relu6": (0.0, 6.0)}[activation],
    )


def linear(draw: Draw) -> Call:
    """Any number of leading dimensions, none too; a vector as weight at times."""
    while True:
        lead, inputs, outputs = draw.sizes(draw.one_of(0, 1, 1, 1, 2, 3)), draw.size(0.03, True), draw.size(0.02, True)
        rows = max(1, math.prod(lead))
        if rows * max(inputs, 1) * max(outputs, 1) <= 3e7 and rows * max(inputs, outputs) < 2e6:
            break
    vector = draw.chance(0.06)  # beside a bias torch takes it for some numbers of dimensions only
    tensors = [draw.values(*lead, inputs), draw.normal(*[inputs] if vector else [outputs, inputs])]
    if draw.chance(0.5) and not vector:
        tensors.append(draw.normal(outputs))
    return Call(tensors, ours.linear, reference.linear, {})


def _targets(draw: Draw, rows: list[int], classes: int, ignore_index: int) -> Tensor:
    ignored = torch.rand(rows, generator=draw.generator) < draw.one_of(0.0, 0.0, 0.2, 0.7, 1.0)
    return torch.where(ignored, ignore_index, draw.classes(rows, classes))


def cross_entropy(draw: Draw) -> Call:
    """Class indices or probabilities, class weights, every reduction, smoothing, ignored rows."""
    while True:
        rank = draw.one_of(0, 1, 1, 1, 2, 3)
        rows, classes = draw.sizes(rank), draw.size(0, large=True)
        if classes * math.prod(rows) < 4e5:
            break
    shape = [*rows[:1], classes, *rows[1:]]
    probabilities, weighted = draw.chance(0.3), draw.chance(0.4)
    ignore_index = -100 if probabilities else draw.one_of(-100, -100, -1, 0, classes - 1)
    reduction, smoothing = draw.one_of("none", "mean", "sum"), draw.one_of(0.0, 0.0, 0.1, 1.0)
    tensors = [draw.values(*shape)]
    targets = None if probabilities else _targets(draw, rows, classes, ignore_index)
    if probabilities:
        tensors.append(draw.uniform(*shape))
    differentiable = list(range(len(tensors)))
    if weighted:
        tensors.append(draw.uniform(classes) + draw.one_of(0.1, 0.0))

    def bound(function: Function) -> Function:
        def run(logits: Tensor, *others: Tensor) -> Tensor:
            rest = list(others)
            target = rest.pop(0) if targets is None else targets
            weight = rest.pop(0) if weighted else None
            options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": smoothing}
            return function(logits, target, weight, **options)

        return run

    arguments = {"probabilities": probabilities, "weighted": weighted, "ignore_index": ignore_index}
    arguments |= {"reduction": reduction, "label_smoothing": smoothing}
    functions = bound(ours.cross_entropy), bound(reference.cross_entropy)
    return Call(tensors, *functions, arguments, differentiable)


def linear_cross_entropy(draw: Draw) -> Call:
    """Against the composition that it computes: a linear layer, then the cross-entropy of its outputs."""
    while True:
        rows, classes, features = draw.size(), draw.size(0, large=True), draw.size(0.01)
        if rows * classes * features < 1e7:
            break
    biased, weighted = draw.chance(0.5), draw.chance(0.4)
    ignore_index = draw.one_of(-100, -100, 0)
    options: dict[str, Any] = {"reduction": draw.one_of("none", "mean", "sum"), "ignore_index": ignore_index}
    options["label_smoothing"] = draw.one_of(0.0, 0.0, 0.1)
    targets = _targets(draw, [rows], classes, ignore_index)
    tensors = [draw.normal(rows, features), draw.normal(classes, features) * draw.one_of(1.0, 0.2)]
    if biased:
        tensors.append(draw.normal(classes))
    differentiable = list(range(len(tensors)))
    if weighted:
        tensors.append(draw.uniform(classes) + 0.1)

    def parts(others: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        rest = list(others)
        return rest.pop(0) if biased else None, rest.pop(0) if weighted else None

    def run_ours(x: Tensor, w: Tensor, *others: Tensor) -> Tensor:
        bias, weight = parts(others)
        return ours.linear_cross_entropy(x, w, targets, linear_bias=bias, weight=weight, **options)

    def run_reference(x: Tensor, w: Tensor, *others: Tensor) -> Tensor:
        bias, weight = parts(others)
        return reference.cross_entropy(reference.linear(x, w, bias), targets, weight, **options)

    return Call(tensors, run_ours, run_reference, dict(biased=biased, weighted=weighted, **options), differentiable)


def attention(draw: Draw) -> Call:
    """Causal, masked by booleans or numbers of any shape that broadcasts, grouped queries, two head sizes."""
    while True:
        lead = draw.sizes(draw.one_of(0, 1, 2, 2, 2), 0.03)
        queries, keys = draw.size(0.03, True), draw.size(0.03, True)
        head_size, value_size = draw.size(0.02), draw.size(0.02)
        if max(1, math.prod(lead)) * max(1, queries) * max(1, keys) * max(1, head_size, value_size) < 2e7:
            break
    group = draw.one_of(2, 3, 4) if len(lead) > 1 and draw.chance(0.15) else 1
    heads = [*lead[:-1], lead[-1] * group] if group > 1 else lead
    kind = draw.one_of("none", "none", "causal", "boolean", "number", "number")
    scale = draw.one_of(None, None, None, 1.0, 0.5, 0.0)
    mask_shape = [1 if draw.chance(0.3) else size for size in [*heads, queries, keys]]
    mask_shape = mask_shape[draw.random.randrange(len(mask_shape) - 1) :] if kind in ("boolean", "number") else []
    tensors = [draw.values(*heads, queries, head_size), draw.values(*lead, keys, head_size)]
    tensors.append(draw.values(*lead, keys, value_size))
    boolean = draw.uniform(*mask_shape) < 0.8 if kind == "boolean" else None
    if kind == "number":
        mask = draw.normal(*mask_shape) * draw.one_of(1.0, 20.0)
        hidden = draw.one_of(None, None, -math.inf, torch.finfo(torch.float16).min)
        tensors.append(mask if hidden is None else mask.masked_fill(draw.uniform(*mask_shape) < 0.3, hidden))

    def bound(function: Function) -> Function:
        def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = boolean) -> Tensor:
            options = {"scale": scale, "enable_gqa": group > 1}
            return function(query, key, value, mask, 0.0, kind == "causal", **options)

        return run

    functions = bound(ours.scaled_dot_product_attention), bound(_attention_of_torch)
    arguments = {"mask": kind, "mask_shape": mask_shape, "scale": scale, "group": group}
    return Call(tensors, *functions, arguments, terms=partial(_terms_of_attention, boolean, kind == "causal", scale))


def _attention_of_torch(*arguments: Any, **options: Any) -> Tensor:
    """The plain formula: torch's fused kernels refuse some of what it takes."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return reference.scaled_dot_product_attention(*arguments, **options)


def _terms_of_attention(
    boolean: Tensor | None, causal: bool, scale: float | None, tensors: list[Tensor], grad: Tensor
) -> list[Tensor]:
    """The gradients with every product and every difference in them replaced by the sum of the sizes."""
    query, key, value, *mask = tensors
    group = query.shape[-3] // max(1, key.shape[-3]) if query.dim() > 2 else 1
    keys, values = (x if group <= 1 else x.repeat_interleave(group, -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query @ keys.mT + (mask[0] if mask else 0)
    if boolean is not None:
        scores = scores.masked_fill(~boolean, -math.inf)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    p = scores.softmax(-1).nan_to_num()
    dp = grad.abs() @ values.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    by_head = [abs(scale) * ds.mT @ query.abs(), p.mT @ grad.abs()]
    if group > 1:
        by_head = [x.unflatten(-3, (-1, group)).sum(-3) for x in by_head]
    return [abs(scale) * ds @ keys.abs(), *by_head, *(ds.sum_to_size(m.shape) for m in mask)]


def lstm(draw: Draw) -> Call:
    """Layers, directions, projections and packed sequences."""
    while True:
        steps, batch, inputs, hidden = draw.size(0.0), draw.size(0.0), draw.size(0.0), draw.size(0.0)
        layers, directions = draw.one_of(1, 1, 2, 3), draw.one_of(1, 1, 2)
        if steps * batch * (inputs + hidden) * hidden * layers * directions < 4e6:
            break
    projection = draw.random.randrange(1, hidden) if hidden > 1 and draw.chance(0.2) else 0
    biased, batch_first, packed = draw.chance(0.8), draw.chance(0.4), draw.chance(0.25)
    out = projection or hidden
    lengths = sorted((draw.random.randrange(1, steps + 1) for _ in range(batch)), reverse=True)
    batch_sizes = torch.tensor([sum(length > step for length in lengths) for step in range(lengths[0])])
    tensors = [draw.normal(sum(lengths), inputs) if packed else draw.normal(steps, batch, inputs)]
    if batch_first and not packed:
        tensors[0] = tensors[0].transpose(0, 1)
    tensors += [draw.normal(layers * directions, batch, out), draw.normal(layers * directions, batch, hidden)]
    for layer in range(layers):
        for _ in range(directions):
            shapes = [[4 * hidden, inputs if layer == 0 else out * directions], [4 * hidden, out]]
            shapes += [[4 * hidden]] * 2 if biased else []
            shapes += [[projection, hidden]] if projection else []
            tensors += [draw.normal(*shape) / math.sqrt(hidden) for shape in shapes]

    def bound(function: Function) -> Function:
        def run(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Any:
            shape = (biased, layers, 0.0, False, directions == 2)
            if packed:
                return function(x, batch_sizes, (h, c), list(weights), *shape)
            return function(x, (h, c), list(weights), *shape, batch_first)

        return run

    arguments = {
        "layers": layers,
        "directions": directions,
        "projection": projection,
        "biased": biased,
        "packed": packed,
    }
    return Call(tensors, bound(ours.lstm), bound(torch.lstm), arguments | {"batch_first": batch_first})


def lstm_cell(draw: Draw) -> Call:
    """One step."""
    batch, inputs, hidden = draw.size(), draw.size(0.0), draw.size(0.0)
    tensors = [draw.normal(batch, inputs), draw.normal(batch, hidden), draw.normal(batch, hidden)]
    tensors += [draw.normal(4 * hidden, inputs), draw.normal(4 * hidden, hidden)]
    if draw.chance(0.7):
        tensors += [draw.normal(4 * hidden), draw.normal(4 * hidden)]

    def bound(function: Function) -> Function:
        return lambda x, h, c, *weights: function(x, (h, c), *weights)

    return Call(tensors, bound(ours.lstm_cell), bound(torch.lstm_cell), {})


CALLS: dict[str, Callable[[Draw], Call]] = {
    function.__name__: function
    for function in (conv2d, batch_norm, linear, cross_entropy, linear_cross_entropy, attention, lstm, lstm_cell)
}
