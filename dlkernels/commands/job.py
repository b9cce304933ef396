"""What ``dlkernels train`` is asked to do: from its options, or from the checkpoint of a run that is to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import typer

from .. import models, train
from ..data import AT_PATH, NAMED, sources
from ..train import Recipe, Settings, checkpoint, networks
from . import Failure

DEVICES = ("cpu", "cuda")
# The parameters of the command by what they belong to.
SETTINGS = tuple(field.name for field in fields(Settings))
RECIPE = ("network", "source", "arguments", "image_size", "tokens", "length", "backend")
JOB = ("device", "threads", "log_file", "tensorboard", "save_every")
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

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**vars(self), "recipe": self.recipe.to_json()}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Job:
        """The job that :meth:`to_json` has described."""
        return cls(**{**facts, "recipe": Recipe.from_json(facts["recipe"])})

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
    if device == "cuda" and not torch.cuda.is_available():
        raise Failure("torch finds no GPU; --device cpu needs none")
    if folder is not None and (folder / checkpoint.LAST).exists():
        raise Failure(f"{folder} has a run already; dlkernels train --resume {folder} goes on with it")
    asked = as_in_a_job(given["network"], given)
    recipe = train.recipe(
        settings={name: asked[name] for name in SETTINGS if name in asked},
        **{name: asked[name] for name in RECIPE if name in asked},
    )
    return Job(recipe=recipe, **{name: asked[name] for name in JOB if name in asked})


def saved_job(folder: Path, given: Mapping[str, Any]) -> Job:
    """The job of the run in ``folder``. What is given nevertheless must be what it was started with."""
    try:
        job = Job.from_json(checkpoint.read_facts(folder / checkpoint.LAST)["run"])
    except (KeyError, TypeError) as error:
        raise Failure(f"{folder} has no run of this version of dlkernels: {error}") from None
    known = {**job.options(), "save": absolute(folder), "resume": absolute(folder)}
    for name, value in as_in_a_job(job.recipe.network, given).items():
        if value != known[name]:
            raise typer.BadParameter(f"it was {known[name]} when the run started, got {value}", param_hint=option(name))
    return job


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
