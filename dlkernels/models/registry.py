"""Networks by name, as torchvision finds its own: ``get_model("resnet50", num_classes=10)``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Builder = Callable[..., torch.nn.Module]
BuilderType = TypeVar("BuilderType", bound=Builder)

_builders: dict[str, Builder] = {}


def register(builder: BuilderType) -> BuilderType:
    """Makes a function or class that builds a network known by its own name.

    Raises:
        ValueError: the name is taken.
    """
    name = builder.__name__.lower()
    if name in _builders:
        raise ValueError(f"a network named {name!r} is registered already")
    _builders[name] = builder
    return builder


def list_models(family: str | None = None) -> list[str]:
    """Names of all networks in alphabetical order, or of those in one file of ``dlkernels/models``.

    Raises:
        ValueError: there is no such family.

    Examples:
        >>> import dlkernels.models
        >>> list_models("lenet")
        ['lenet', 'lenet5']
    """
    families = {name: builder.__module__.rpartition(".")[2] for name, builder in _builders.items()}
    if family is not None and family not in families.values():
        raise ValueError(f"family must be one of {', '.join(sorted(set(families.values())))}, got {family!r}")
    return sorted(name for name in _builders if family in (None, families[name]))


def get_model_builder(name: str) -> Builder:
    """The function or class that builds the network called ``name``.

    Raises:
        ValueError: there is none; the message names the closest.

    Examples:
        >>> import dlkernels.models
        >>> get_model_builder("lenet5")
        <class 'dlkernels.models.lenet.LeNet5'>
    """
    builder = _builders.get(name.lower())
    if builder is None:
        close = difflib.get_close_matches(name.lower(), _builders, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"there is no network named {name!r}{hint} dlkernels.models.list_models() names all")
    return builder


def get_model(name: str, **arguments: object) -> torch.nn.Module:
    """Builds the network called ``name``; its builder takes the arguments.

    Raises:
        ValueError: there is no such network; the message names the closest.

    Examples:
        >>> import dlkernels.models
        >>> network = get_model("resnet20", num_classes=100)
        >>> network(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """
    return get_model_builder(name)(**arguments)


def load_weights(model: torch.nn.Module, state_dict: Mapping[str, Tensor]) -> torch.nn.Module:
    """Loads ``state_dict`` strictly into ``model``, which it returns, after comparing every name and shape.

    Raises:
        ValueError: something does not fit: the message names the first entry that is missing, too much or of another
            shape. ``model`` is then as it was.

    Examples:
        >>> one, other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> torch.equal(load_weights(one, other.state_dict()).weight, other.weight)
        True
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state_dict:
            raise ValueError(f"the weights have no {name!r}, which {type(model).__name__} needs")
        if state_dict[name].shape != tensor.shape:
            shapes = f"{list(state_dict[name].shape)}, {type(model).__name__} needs {list(tensor.shape)}"
            raise ValueError(f"{name!r} has shape {shapes}")
    for name in state_dict:
        if name not in expected:
            raise ValueError(f"the weights have {name!r}, which {type(model).__name__} has not")
    model.load_state_dict(state_dict, strict=True)
    return model
