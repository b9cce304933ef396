"""Tensors changed in place between a call and its backward: where torch's separate layers allow it, so do ours, with
the gradients that torch has; what is allowed by torch and not here is listed, and documented."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import dlkernels
from dlkernels import functional as F

torch_functional = torch.nn.functional

Call = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Program(NamedTuple):
    """A call of ours, the layers of torch that compute the same, and what both are called with."""

    ours: Call
    torchs: Call
    tensors: dict[str, Tensor]
    constants: tuple[str, ...] = ()  # tensors that want no gradient
    refused_here: tuple[str, ...] = ()  # what torch lets a program change and this package does not


def norm(activation: str | None, residual: bool, training: bool) -> Program:
    applied: Call = {None: lambda x: x, "relu": torch.relu, "relu6": torch_functional.relu6}[activation]
    mean, variance = normal(3), normal(3).abs() + 0.5

    def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, mean.clone(), variance.clone(), w, b, training, activation=activation, residual=r)

    def torchs(x: Tensor, w: Tensor, b: Tensor, r: Tensor | None = None) -> Tensor:
        y = torch_functional.batch_norm(x, mean.clone(), variance.clone(), w, b, training)
        return applied(y if r is None else y + r)

    tensors = {"x": 4 * normal(4, 3, 5, 7), "w": 3 * normal(3), "b": normal(3)}
    return Program(ours, torchs, tensors | ({"r": 4 * normal(4, 3, 5, 7)} if residual else {}))


def attention(mask: Tensor | None, refused: tuple[str, ...] = ()) -> Program:
    tensors = {name: normal(2, 4, 7, 8) for name in "qkv"} | ({} if mask is None else {"mask": mask})
    return Program(
        F.scaled_dot_product_attention, torch_functional.scaled_dot_product_attention, tensors, refused_here=refused
    )


def losses(probabilities: bool, reduction: str) -> Program:
    target = normal(4, 5).softmax(1) if probabilities else torch.tensor([0, 4, 2, 3])

    def call(f: Call) -> Call:
        return lambda x, target, weight: f(x, target, weight, reduction=reduction)

    tensors = {"x": normal(4, 5), "target": target, "weight": normal(5).abs()}
    ours, torchs = call(F.cross_entropy), call(torch_functional.cross_entropy)
    return Program(ours, torchs, tensors, ("weight",), refused_here=("x",))


def losses_of_layer() -> Program:
    def call(f: Call) -> Call:
        return lambda x, w, b, target: f(x, w, target, linear_bias=b)

    tensors = {"x": normal(4, 6), "w": normal(5, 6), "b": normal(5), "target": torch.tensor([0, 4, 2, 3])}
    return Program(call(F.linear_cross_entropy), call(torch_functional.linear_cross_entropy), tensors)


def recurrent(layers: int, projection: int, packed: bool, batch_first: bool = False) -> Program:
    module = torch.nn.LSTM(3, 4, layers, proj_size=projection, dtype=torch.float64)
    batch_sizes = torch.tensor([2, 2, 1])

    def call(f: Call) -> Call:
        def run(x: Tensor, h: Tensor, c: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            if packed:
                return f(x, batch_sizes, (h, c), parameters, True, layers, 0.0, True, False)
            return f(x, (h, c), parameters, True, layers, 0.0, True, False, batch_first)

        return run

    x = normal(5, 3) if packed else normal(2, 5, 3) if batch_first else normal(5, 2, 3)
    tensors = {"x": x, "h": normal(layers, 2, projection or 4), "c": normal(layers, 2, 4)}
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    refused = [name for name in parameters if name.startswith("bias")]
    if batch_first:  # torch copies what it turns around
        refused.append("x")
    return Program(call(F.lstm), call(torch.lstm), tensors | parameters, refused_here=tuple(refused))


def cell() -> Program:
    def call(f: Call) -> Call:
        return lambda x, h, c, *parameters: f(x, (h, c), *parameters)

    shapes = {"x": (2, 3), "h": (2, 4), "c": (2, 4), "w_ih": (16, 3), "w_hh": (16, 4), "b_ih": (16,), "b_hh": (16,)}
    tensors = {name: normal(*shape) for name, shape in shapes.items()}
    return Program(call(F.lstm_cell), call(torch.lstm_cell), tensors, refused_here=("b_ih", "b_hh"))


def programs() -> dict[str, Program]:
    image = {"x": normal(2, 3, 8, 8), "w": normal(4, 3, 3, 3), "b": normal(4)}
    rows = {"x": normal(5, 3), "w": normal(4, 3), "b": normal(4)}
    boolean = torch.ones(7, 7, dtype=torch.bool).tril()
    found = {
        "conv2d": Program(F.conv2d, torch_functional.conv2d, image),
        "linear": Program(F.linear, torch_functional.linear, rows),
        "attention": attention(None),
        "attention_boolean": attention(boolean),
        "attention_boolean_expanded": attention(boolean[None, None].expand(2, 4, 7, 7)),
        # torch's kernel for a mask that wants a gradient keeps scaled copies; ours and its fused one keep these.
        "attention_float": attention(normal(7, 7), refused=("output", "q", "k", "mask")),
        "linear_cross_entropy": losses_of_layer(),
        "lstm_cell": cell(),
    }
    for activation in (None, "relu", "relu6"):
        for residual in (False, True):
            for training in (True, False):
                name = f"batch_norm_{activation}_{'residual_' * residual}{'training' if training else 'evaluation'}"
                found[name] = norm(activation, residual, training)
    for probabilities in (False, True):
        for reduction in ("mean", "none"):
            kind = "probabilities" if probabilities else "indices"
            found[f"cross_entropy_{kind}_{reduction}"] = losses(probabilities, reduction)
    for layers in (1, 2):
        for projection in (0, 2):
            for packed in (False, True):
                found[f"lstm_{layers}_{projection}_{'packed' if packed else 'dense'}"] = recurrent(
                    layers, projection, packed
                )
    found["lstm_batch_first"] = recurrent(1, 0, False, batch_first=True)
    return found


def seeded_programs() -> dict[str, Program]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return programs()


PROGRAMS = seeded_programs()


def gradients_after(call: Call, program: Program, changed: str) -> list[Tensor]:
    """Gradients of all that wants them, where ``changed`` is changed in place between the call and backward."""
    leaves = {
        name: tensor.clone().requires_grad_(tensor.is_floating_point() and name not in program.constants)
        for name, tensor in program.tensors.items()
    }
    arguments = {name: leaf.clone() for name, leaf in leaves.items()}
    for name, tensor in program.tensors.items():
        if 0 in tensor.stride() and not tensor.is_floating_point():
            arguments[name] = tensor[:1, :1].clone().expand(tensor.shape)
    outputs = call(*arguments.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for tensor in outputs if changed == "output" else (arguments[changed],):
        with torch.no_grad():
            base = tensor if tensor._base is None or changed == "output" else tensor._base
            base.logical_not_() if tensor.dtype == torch.bool else base.add_(1)
    torch.manual_seed(1)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    return list(torch.autograd.grad(outputs, wanted, [torch.randn_like(output) for output in outputs]))


def allows(call: Call, program: Program, changed: str) -> list[Tensor] | None:
    try:
        return gradients_after(call, program, changed)
    except RuntimeError as error:
        if "modified" not in str(error):
            raise
        return None


CHANGES = [(name, changed) for name, program in PROGRAMS.items() for changed in ("output", *program.tensors)]


@pytest.mark.parametrize(("name", "changed"), CHANGES)
def test_what_torch_lets_a_program_change_may_be_changed(name: str, changed: str) -> None:
    program = PROGRAMS[name]
    expected = allows(program.torchs, program, changed)
    if expected is None:
        return
    found = allows(program.ours, program, changed)
    assert (found is None) == (changed in program.refused_here)
    for ours, torchs in zip(found or [], expected, strict=False):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_relu6_passes_gradients_where_its_rounded_argument_is_inside(
    isa: str, dtype: torch.dtype, residual: bool, training: bool, channels_last: bool
) -> None:
    """Arguments close to 0 and to 6, some of which only rounding puts there."""
    mean, weight, bias = torch.randn(3, 16).to(dtype)
    variance = torch.rand(16).to(dtype) + 0.5
    steps = torch.linspace(-1, 1, 15)
    near = torch.cat([steps * 2.0**-exponent for exponent in (0, 6, 9, 12)])
    wanted = torch.cat([near, 6 + near]).view(1, 1, 8, 15)  # what the arguments should be, more or less
    scale = (weight / (variance + 1e-5).sqrt()).float().view(1, -1, 1, 1)
    shift = (bias - mean * scale.view(-1)).float().view(1, -1, 1, 1)
    input = ((wanted.expand(2, 16, 8, 15) - shift) / scale).to(dtype)
    added = (torch.randn(2, 16, 8, 15) * 2.0**-8).to(dtype) if residual else None
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    input.requires_grad_()
    statistics = (mean.clone(), variance.clone())
    argument = F.batch_norm(input.detach(), *statistics, weight, bias, training, residual=added)
    statistics = (mean.clone(), variance.clone())
    output = F.batch_norm(input, *statistics, weight, bias, training, activation="relu6", residual=added)
    grad = torch.ones_like(output)
    passes = (argument > 0) & (argument < 6)
    plain = F.batch_norm(input, mean.clone(), variance.clone(), weight, bias, training)
    (expected,) = torch.autograd.grad(plain, input, grad * passes)
    output.detach().add_(1)
    (found,) = torch.autograd.grad(output, input, grad)
    assert torch.equal(found, expected)
    assert 0.2 < passes.float().mean() < 0.8


@pytest.mark.parametrize("activation", [torch.nn.ReLU6, torch.nn.Identity])
def test_a_converted_activation_leaves_its_output_to_the_program(isa: str, activation: type[torch.nn.Module]) -> None:
    torchs = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), activation())
    ours = dlkernels.convert(copy.deepcopy(torchs))
    images, added = torch.randn(2, 3, 9, 9), torch.randn(2, 8, 7, 7)

    def gradients(model: torch.nn.Module) -> tuple[Tensor, ...]:
        output = model(images)
        output += added
        return torch.autograd.grad(output.square().sum(), list(model.parameters()))

    for found, expected in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_changed_output_of_a_layer_leaves_second_derivatives(isa: str) -> None:
    program = PROGRAMS["batch_norm_relu6_training"]
    results = []
    for call in (program.ours, program.torchs):
        leaves = [tensor.clone().requires_grad_() for tensor in program.tensors.values()]
        output = call(*leaves)
        torch.manual_seed(2)
        total = (output * torch.randn_like(output)).sum()
        output.detach().add_(1)
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
        results.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, second, strict=True)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)
