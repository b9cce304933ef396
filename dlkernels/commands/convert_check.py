"""``dlkernels convert-check``: what :func:`dlkernels.convert` makes of a model, and whether that computes the same."""

from __future__ import annotations

import copy
import importlib
import sys
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ..convert import convert, report
from . import Failure

TOLERANCE = 1e-3  # of a tensor's largest element: rounding of a deep network in float32


def convert_check_command(
    model: Annotated[str, typer.Argument(help="MODULE:CALLABLE; the callable takes nothing and returns the model.")],
    shape: Annotated[str, typer.Option(help="Of its input, drawn from the normal distribution: 2,3,224,224.")],
    seed: Annotated[int, typer.Option(min=0, help="Of weights and input.")] = 0,
) -> None:
    """Convert a copy of a model and compare outputs and gradients."""
    sizes = parsed_shape(shape)
    build = imported_callable(model)
    torch.manual_seed(seed)
    original = build()
    if not isinstance(original, torch.nn.Module):
        raise typer.BadParameter(f"{model} returned {type(original).__name__}, expected a module", param_hint="MODEL")
    input = torch.randn(sizes)
    converted = convert(copy.deepcopy(original))
    print(report(converted))
    try:
        expected, actual = (results_of(module, input, seed) for module in (original, converted))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise typer.BadParameter(f"the model refuses it: {error}", param_hint="--shape") from None
    wrong = []
    for what in expected:
        name, largest = largest_difference(actual[what], expected[what])
        print(f"{what}: {len(expected[what])}, largest difference {largest:.1e} of the largest element, in {name}")
        if not largest <= TOLERANCE:
            wrong.append(what)
    if wrong:
        raise Failure(f"{' and '.join(wrong)} differ by more than {TOLERANCE:.0e}")


def parsed_shape(text: str) -> list[int]:
    """``"2,3,8"`` as ``[2, 3, 8]``."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"must be positive integers with commas, got {text}", param_hint="--shape")
    return sizes


def imported_callable(text: str) -> Any:
    """The object that ``"package.module:name"`` names; modules of the current directory too."""
    module_name, colon, name = text.partition(":")
    if not (module_name and colon and name):
        raise typer.BadParameter(f"must be MODULE:CALLABLE, got {text}", param_hint="MODEL")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(f"{text}: {error}", param_hint="MODEL") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise typer.BadParameter(f"{text} is not callable", param_hint="MODEL")
    return found


def results_of(model: torch.nn.Module, input: Tensor, seed: int) -> dict[str, dict[str, Tensor]]:
    """Outputs of the model, in the mode it is in, and their gradients for fixed cotangents, by name."""
    torch.manual_seed(seed)
    leaf = input.clone().requires_grad_()
    outputs = [output for output in torch.utils._pytree.tree_leaves(model(leaf)) if isinstance(output, Tensor)]
    differentiable = [output for output in outputs if output.requires_grad]
    torch.manual_seed(seed)
    cotangents = [torch.randn_like(output) for output in differentiable]
    sources = {"the input": leaf} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        differentiable, list(sources.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return {
        "outputs": {f"output {index}": output.detach() for index, output in enumerate(outputs)},
        "gradients": dict(zip(sources, gradients, strict=True)),
    }


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """The name of the tensor that differs most, and by how much, as a share of its largest element.

    That counts as at least a hundredth of the largest of all: a gradient may be zero but for rounding, as that of a
    bias before batch norm is.
    """
    largest = {name: float(tensor.abs().max()) if tensor.numel() else 0.0 for name, tensor in expected.items()}
    floor = max(1e-2 * max(largest.values()), torch.finfo(torch.float32).tiny)
    shares = {
        name: float((actual[name].double() - tensor.double()).abs().max()) / max(largest[name], floor)
        for name, tensor in expected.items()
        if tensor.numel()
    }
    return max(shares.items(), key=lambda item: item[1])
