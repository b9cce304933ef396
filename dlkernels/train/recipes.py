"""A network with the data it is trained on and how: everything that a run is made from, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import data, nn, typed_json
from ..data import DataSet, Images
from ..models import get_model_builder
from . import networks
from .loop import Trainer
from .networks import Value
from .settings import Settings, TrainingError
from .tasks import Task, task_of

# Where modules come from: everything else of a recipe is the same for both.
BACKENDS = {"dlkernels": nn, "torch": torch.nn}
TOO_LARGE = (MemoryError, OverflowError, RuntimeError)  # what sizes raise that no memory is enough for


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, as JSON can hold it.

    Args:
        network: a name of :func:`dlkernels.models.list_models`.
        source: the data; see :func:`dlkernels.data.load`, also for ``image_size``, ``tokens`` and ``length``.
        settings: how to train.
        arguments: of the network's constructor, besides those that follow from the data.
        backend: whose operators compute, ``"dlkernels"`` or ``"torch"``.

    Raises:
        ValueError: there is no such network or backend, or ``image_size`` is not positive.
    """

    network: str
    source: str
    settings: Settings
    arguments: Mapping[str, Value] = field(default_factory=dict)
    image_size: int | None = None
    tokens: str = "character"
    length: int = 64
    backend: str = "dlkernels"

    def __post_init__(self) -> None:
        get_model_builder(self.network)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")

    @property
    def task(self) -> Task:
        """What the network is trained for."""
        return task_for(self.network, self.backend)

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Any) -> Recipe:
        """The recipe that :meth:`to_json` has described.

        Raises:
            ValueError: ``facts`` are no such description; the message names the entry.
        """
        return typed_json.as_dataclass(cls, facts, "recipe")


def recipe(
    network: str, source: str | None = None, *, settings: Mapping[str, Any] | None = None, **options: Any
) -> Recipe:
    """The recipe for a network, with the data and the settings of its task where they are not given.

    Raises:
        ValueError: there is no such network or backend, or a setting is outside its range.
    """
    task = task_for(network)
    chosen = dataclasses.replace(task.settings, **(settings or {}))
    return Recipe(network=network, source=source or task.source, settings=chosen, **options)


def task_for(network: str, backend: str = "dlkernels") -> Task:
    """What the network called ``network`` is trained for.

    Raises:
        ValueError: there is no such network.
    """
    return task_of(networks.network_class(get_model_builder(network)))(BACKENDS[backend])


def prepare(recipe: Recipe, device: torch.device | str = "cpu") -> Trainer:
    """Loads the data, builds the network, and tries it on an example or two.

    Raises:
        DataError: a file is damaged.
        ModuleNotFoundError: the data needs a package that is not installed.
        TrainingError: the network does not take the data, or the settings do not fit it.
        ValueError: the data is not of the network's kind, or the network refuses an argument.
    """
    settings, task = recipe.settings, recipe.task
    options = {"image_size": recipe.image_size, "tokens": recipe.tokens, "length": recipe.length}
    try:
        dataset = data.load(recipe.source, task.kind, seed=settings.seed, **options)  # type: ignore[arg-type]
    except TOO_LARGE as error:
        raise ValueError(f"{recipe.source}: {error or 'out of memory'}") from None
    known = networks.parameters(get_model_builder(recipe.network))
    if isinstance(dataset, Images) and not {"in_channels", "in_features"} & known.keys():
        dataset = dataclasses.replace(dataset, channels=3)  # as networks for photographs have it
    model = build(recipe, {name: value for name, value in task.arguments(dataset).items() if name in known})
    try_out(recipe.network, model.to(device), task, dataset)
    return Trainer(model, task, dataset, settings, device)


def build(recipe: Recipe, found: Mapping[str, object]) -> torch.nn.Module:
    """The network with arguments ``found`` in the data and those that the recipe has instead of or beside them."""
    builder = get_model_builder(recipe.network)
    arguments = {**found, **recipe.arguments, "layers": BACKENDS[recipe.backend]}
    missing = [name for name in networks.required(builder) if name not in arguments]
    if missing:
        them = "it as an argument" if len(missing) == 1 else "them as arguments"
        raise ValueError(f"{recipe.network} needs {', '.join(missing)}; give {them}")
    torch.manual_seed(recipe.settings.seed)
    try:
        return builder(**arguments)
    except (*TOO_LARGE, TypeError, ValueError) as error:
        raise ValueError(f"{recipe.network}: {error or 'out of memory'}") from None


def try_out(name: str, model: torch.nn.Module, task: Task, dataset: DataSet) -> None:
    """Evaluates two examples, so that what does not fit is known before training starts."""
    device = next(model.parameters()).device
    batch = [column.to(device) for column in task.inputs(dataset.batch(dataset.train, torch.arange(2)))]
    model.eval()
    try:
        with torch.no_grad():
            task.figures(model, *batch)
    except (IndexError, RuntimeError, ValueError) as error:
        shapes = " and ".join(str(list(column.shape[1:])) for column in batch if column.dim() > 1)
        hint = "; images can be given another size" if isinstance(dataset, Images) else ""
        raise TrainingError(f"{name} does not take examples of shape {shapes}{hint}: {error}") from None
    model.train()


def some_steps(trainer: Trainer, steps: int = 20) -> Callable[[], None]:
    """A program of a few training steps like those of a run, to be measured. It moves the weights on."""

    def program() -> None:
        again = Trainer(trainer.model, trainer.task, trainer.data, trainer.settings, trainer.device)
        again.model.train()
        for _ in range(steps):
            again.take_step(again.settings.peak_rate)

    return program
