"""What ``dlkernels train`` is asked to do: from its options, or from the checkpoint of a run that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import typer

from .. import models, train, typed_json
from ..data import AT_PATH, NAMED, sources
from ..train import CheckpointError, Recipe, Settings, checkpoint, logs, networks
from ..train.state import State
from . import MOST_THREADS, Failure

DEVICES = ("cpu", "cuda")
# The parameters of the command by what they belong to.
SETTINGS = tuple(field.name for field in fields(Settings))
RECIPE = ("network", "source", "arguments", "image_size", "tokens", "length", "backend")
JOB = ("device", "threads", "log_file", "tensorboard", "save_every")
PLACES = ("log_file", "tensorboard")  # what of these is written to
# Options of some kinds of data.
ONLY_FOR = {"image_size": ("images", "captions", "questions"), "tokens": ("text",), "length": ("text",)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the command was asked to do, as JSON can hold it."""

    recipe: Recipe
    device: str = "cpu"
    threads: int = 1
    log_file: str | None = None
    tensorboard: str | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device must be {' or '.join(DEVICES)}, got {self.device}")
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be in 1 to {MOST_THREADS}, got {self.threads}")
        if self.save_every is not None and self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")

    def to_json(self, folder: Path | None = None) -> dict[str, Any]:
        """What JSON can hold. What is written to inside of ``folder`` is named from there, so that it can be moved."""
        facts = {**vars(self), "recipe": self.recipe.to_json()}
        for name in PLACES:
            if folder is not None and facts[name] is not None and Path(facts[name]).is_relative_to(folder.resolve()):
                facts[name] = str(Path(facts[name]).relative_to(folder.resolve()))
        return facts

    @classmethod
    def from_json(cls, facts: Any) -> Job:
        """The job that :meth:`to_json` has described.

        Raises:
            ValueError: ``facts`` are no such description; the message names the entry.
        """
        job = typed_json.as_dataclass(cls, facts, "run")
        networks.check(models.get_model_builder(job.recipe.network), job.recipe.arguments)
        return job

    def options(self) -> dict[str, Any]:
        """Its values by the names of the command's parameters."""
        recipe = self.recipe.to_json()
        return {**vars(self), **recipe, **recipe["settings"]}


def new_job(given: Mapping[str, Any]) -> Job:
    """What the options ask for; what they leave out is chosen for the kind of network."""
    if "network" not in given:
        raise typer.BadParameter("which network? `dlkernels models` lists them; for example: dlkernels train lenet")
    device, folder = given.get("device", "cpu"), given.get("save")
    if device not in DEVICES:
        raise typer.BadParameter(f"must be {' or '.join(DEVICES)}, got {device}", param_hint="--device")
    check_device(device)
    if folder is not None and (folder / checkpoint.LAST).exists():
        raise Failure(f"{folder} has a run already; dlkernels train --resume {folder} goes on with it")
    asked = as_in_a_job(given["network"], given)
    recipe = train.recipe(
        settings={name: asked[name] for name in SETTINGS if name in asked},
        **{name: asked[name] for name in RECIPE if name in asked},
    )
    return Job(recipe=recipe, **{name: asked[name] for name in JOB if name in asked})


def check_device(device: str) -> None:
    """Refuses a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Failure("torch finds no GPU; --device cpu needs none")


def saved_job(folder: Path, given: Mapping[str, Any]) -> Job:
    """The job of the run in ``folder``. What is given nevertheless must be what it was started with.

    Only where it writes to may be given anew, and must be where the checkpoint cannot be trusted with it.
    """
    path = folder / checkpoint.LAST
    facts = checkpoint.read_facts(path)
    with checkpoint.wrong_in(path):
        job, state = Job.from_json(facts.get("run")), State.from_json(facts.get("state"))
    check_device(job.device)
    known = {**job.options(), "save": absolute(folder), "resume": absolute(folder)}
    asked = as_in_a_job(job.recipe.network, given)
    for name, value in asked.items():
        if name not in PLACES and value != known[name]:
            raise typer.BadParameter(f"it was {known[name]} when the run started, got {value}", param_hint=option(name))
    log_file, tensorboard = (asked.get(name) or trusted(name, known[name], folder, state) for name in PLACES)
    return replace(job, log_file=log_file, tensorboard=tensorboard)


def trusted(name: str, value: str | None, folder: Path, state: State) -> str | None:
    """Where the run in ``folder`` may write to, absolute, if that is what its checkpoint says.

    A checkpoint may be somebody else's, and name any file of the user. So it is a place inside of ``folder``, wherever
    links lead, or a log that holds the very steps that the checkpoint was made after.

    Raises:
        CheckpointError: it is another place.
    """
    if value is None:
        return None
    place = (folder / value).resolve()
    inside = place.is_relative_to(folder.resolve())
    if inside or (name == "log_file" and logs.belongs_to(place, state.step, state.seconds)):
        return str(place)
    what = "has not this run's steps" if name == "log_file" else "is outside of the run's folder"
    raise CheckpointError(
        f"{folder / checkpoint.LAST} says that the run writes to {place}, which {what}; "
        f"say where it may write with {option(name)}"
    )


def as_in_a_job(network: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a :class:`Job` for ``network`` has them: arguments of its constructor as such, paths absolute."""
    asked = {name: absolute(value) if isinstance(value, Path) else value for name, value in given.items()}
    kind, title = train.task_for(network).kind, train.task_for(network).title
    for name, kinds in ONLY_FOR.items():
        if name in asked and kind not in kinds:
            raise typer.BadParameter(f"{network} is {title}, for which this means nothing", param_hint=option(name))
    if "network" in asked:
        asked["network"] = network.lower()
    if "source" in asked and asked["source"] not in NAMED[kind]:
        if kind not in AT_PATH or not Path(asked["source"]).exists():
            problem = f"{network} is {title}, trained on {sources(kind)}; there is no {asked['source']}"
            raise typer.BadParameter(problem, param_hint=option("source"))
        asked["source"] = absolute(Path(asked["source"]))
    if "arguments" in asked:
        try:
            asked["arguments"] = networks.chosen(models.get_model_builder(network), asked["arguments"])
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=option("arguments")) from None
    return asked


def absolute(path: Path) -> str:
    """So that it means the same when the run is resumed from another folder."""
    return str(path.resolve())


def option(name: str) -> str:
    """What the parameter is called on the command line."""
    return {"source": "--data", "arguments": "--set", "network": "NETWORK"}.get(name, f"--{name.replace('_', '-')}")
