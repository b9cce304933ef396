"""``dlkernels train``: any network on data of its kind; alone or under ``torchrun``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import models, train
from ..data import AT_PATH, NAMED, DataError, sources
from ..train import (
    OPTIMIZERS,
    SCHEDULES,
    Progress,
    Recipe,
    Settings,
    Trainer,
    checkpoint,
    distributed,
    logs,
    networks,
    show,
)
from ..train.interrupt import stopping_on_signals
from . import Failure, missing_package

DEVICES = ("cpu", "cuda")
SETTINGS = tuple(field.name for field in fields(Settings))
RECIPE = ("network", "source", "arguments", "image_size", "tokens", "length", "backend")
JOB = ("device", "threads", "log_file", "tensorboard", "save_every")


def train_command(
    network: Annotated[str | None, typer.Argument(help="What to train; `dlkernels models` lists all.")] = None,
    source: Annotated[
        str | None, typer.Option("--data", help="digits, text, synthetic, or the path of a folder or text file.")
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An argument of the network; may be repeated."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Height and width that images are resized to.")] = None,
    tokens: Annotated[str | None, typer.Option(help="What a text is split into: character or word.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens that a language model sees at once.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training examples.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Examples in a step, of all processes.")] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Parts that a batch is computed in.")] = None,
    optimizer: Annotated[str | None, typer.Option(help=", ".join(OPTIMIZERS) + ".")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of momentum and nesterov; first beta of adam, adamw.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices and filters.")] = None,
    schedule: Annotated[str | None, typer.Option(help=", ".join(SCHEDULES) + ".")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of classifiers.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Longest gradient.")] = None,
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Evaluate a moving average of the weights.")
    ] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without improvement.")] = None,
    amp: Annotated[bool | None, typer.Option("--amp", help="Autocast to bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides weights, split and order.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="1 if not given: enough for a small network.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, if not given, or cuda.")] = None,
    backend: Annotated[str | None, typer.Option(help="Whose operators compute: dlkernels or torch.")] = None,
    log_file: Annotated[Path | None, typer.Option(help="Write every step to this file, a line of JSON each.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Write every step to this folder for TensorBoard.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep checkpoints in this folder.")] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints, beside those of epochs.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder; all else is known.")] = None,
) -> None:
    """Train a network; show how it goes and which operations took the time.

    What is not given is chosen for the kind of network. `torchrun --nproc-per-node N -m dlkernels train ...` computes
    the same on N processes.
    """
    given = {name: value for name, value in locals().items() if value is not None}  # first: these are the parameters
    with errors_in_a_line():
        with asked_wrongly():
            job = new_job(given) if resume is None else saved_job(resume, given)
        torch.set_num_threads(job.threads)
        with distributed.processes(job.device) as own:
            console = Console(quiet=distributed.rank() != 0)
            with asked_wrongly():
                trainer = train.prepare(job.recipe, own)
            if resume is not None:
                checkpoint.resume(trainer, resume)
            console.print(heading(job, trainer), highlight=False, soft_wrap=True)
            take_steps(job, trainer, resume or save, console)
            report(job, trainer, console)


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
    _, facts = checkpoint.read(folder / checkpoint.LAST)
    job = Job.from_json(facts["run"])
    known = {**job.options(), "save": absolute(folder), "resume": absolute(folder)}
    for name, value in as_in_a_job(job.recipe.network, given).items():
        if value != known[name]:
            raise typer.BadParameter(f"it was {known[name]} when the run started, got {value}", param_hint=option(name))
    return job


def as_in_a_job(network: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a :class:`Job` for ``network`` has them: arguments of its constructor as such, paths absolute."""
    asked = {name: absolute(value) if isinstance(value, Path) else value for name, value in given.items()}
    kind = train.task_for(network).kind
    if "source" in asked and asked["source"] not in NAMED[kind]:
        if kind not in AT_PATH or not Path(asked["source"]).exists():
            problem = f"{network} is {train.task_for(network).title}, trained on {sources(kind)}"
            raise typer.BadParameter(f"{problem}; there is no {asked['source']}", param_hint=option("source"))
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


def take_steps(job: Job, trainer: Trainer, folder: Path | None, console: Console) -> None:
    """Runs to the end, showing, logging and saving."""
    run, since, first = trainer.run(), trainer.step, distributed.rank() == 0
    if job.log_file is not None and first:
        run = logs.logged(run, Path(job.log_file), since)
    if job.tensorboard is not None and first:
        run = logs.boarded(run, Path(job.tensorboard), since)
    if folder is not None:
        run = checkpoint.saved(run, trainer, folder, job.to_json(), job.save_every)
    with stopping_on_signals(trainer):
        for progress in show.shown(run, console):
            if trainer.stopping and not trainer.finished:
                stop(progress, folder)


def stop(progress: Progress, folder: Path | None) -> NoReturn:
    """Ends a run that was interrupted."""
    if distributed.rank() != 0:
        raise typer.Exit(1)
    how = "nothing is saved without --save" if folder is None else f"go on with: dlkernels train --resume {folder}"
    where = f"epoch {progress.epoch}, step {progress.step} of {progress.steps}, {show.describe(progress)}"
    raise Failure(f"interrupted at {where}; {how}")


def heading(job: Job, trainer: Trainer) -> str:
    """What is about to be trained on what."""
    recipe, data = job.recipe, trainer.data
    sizes = (
        f"{len(data.train[0])} examples to train, {len(data.validation[0])} to validate, {len(data.test[0])} to test"
    )
    processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
    computed = f"{recipe.backend}, {job.device}, threads {job.threads}, seed {recipe.settings.seed}{processes}"
    return f"{recipe.network} on {recipe.source}: {sizes}; {computed}"


def report(job: Job, trainer: Trainer, console: Console) -> None:
    """The figures of the test part, and where the time of a step goes."""
    figures = trainer.finish()
    if trainer.settings.patience is not None:
        epoch = trainer.best_step // trainer.steps_per_epoch
        console.print(f"the weights are those of epoch {epoch}, the best of {trainer.step // trainer.steps_per_epoch}")
    console.print(f"test {show.figures(figures)} after {trainer.seconds:.1f} s of training", highlight=False)
    if job.log_file is not None and distributed.rank() == 0:
        logs.conclude(Path(job.log_file), figures)
    if distributed.size() > 1 or job.device != "cpu":
        return  # the profile is of one process on the processor
    about_a_second = min(20, max(1, round(trainer.step / max(trainer.seconds, 1e-9))))
    used = train.operation_times(train.some_steps(trainer, about_a_second))
    console.print(operations_table(used))
    counted = [entry for entry in used if entry.calls]
    console.print(
        f"{sum(entry.on_dlkernels for entry in counted)} of {sum(entry.calls for entry in counted)} calls of "
        f"{', '.join(entry.name for entry in counted)} ran on dlkernels",
        highlight=False,
        soft_wrap=True,
    )


def operations_table(used: list[train.OperationTime]) -> Table:
    """Time, share and calls of each operation."""
    table = Table(title="Where the time of a training step goes", title_justify="left")
    table.add_column("operation")
    for heading in ("share", "ms", "calls", "on dlkernels"):
        table.add_column(heading, justify="right")
    total = sum(entry.seconds for entry in used)
    for entry in used:
        calls = (str(entry.calls), str(entry.on_dlkernels)) if entry.calls else ("", "")
        table.add_row(entry.name, f"{entry.seconds / total:.1%}", f"{1e3 * entry.seconds:.1f}", *calls)
    return table


@contextmanager
def asked_wrongly() -> Iterator[None]:
    """Values that cannot be are errors of usage, but for what is wrong with a file."""
    try:
        yield
    except DataError as error:
        raise Failure(str(error)) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """What a run can fail of, as a failure of the command."""
    try:
        yield
    except (train.TrainingError, train.CheckpointError) as error:
        raise Failure(str(error)) from None
    except ModuleNotFoundError as error:
        raise missing_package("this run", error) from None
