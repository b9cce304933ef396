"""``dlkernels train``: any network on data of its kind; alone or under ``torchrun``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import train
from ..data import DataError
from ..train import OPTIMIZERS, SCHEDULES, Progress, Trainer, checkpoint, distributed, logs, show
from ..train.interrupt import stopping_on_signals
from . import MOST_THREADS, Failure, missing_package
from .job import Job, new_job, saved_job


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
    scale_rate: Annotated[
        int | None,
        typer.Option(min=1, metavar="BASE", help="The batch size that the rate is for; it is scaled to yours."),
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of momentum and nesterov; first beta of adam, adamw.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices and filters.")] = None,
    schedule: Annotated[str | None, typer.Option(help=", ".join(SCHEDULES) + ".")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of classifiers.")] = None,
    mixup: Annotated[
        float | None, typer.Option(metavar="ALPHA", help="Of classifiers: weighted sums of images and of labels.")
    ] = None,
    cutmix: Annotated[
        float | None, typer.Option(metavar="ALPHA", help="Of classifiers: parts of other images, and of labels.")
    ] = None,
    cutout: Annotated[int | None, typer.Option(min=1, metavar="SIZE", help="Of classifiers: holes in images.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Longest gradient.")] = None,
    ema: Annotated[
        float | None, typer.Option(metavar="DECAY", help="Evaluate a moving average of the weights.")
    ] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many epochs without improvement.")] = None,
    amp: Annotated[bool | None, typer.Option("--amp", help="Autocast to bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides weights, split and order.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="1 if not given: enough for a small network.")
    ] = None,
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
            carry_out(job, own, resume, save)


def carry_out(job: Job, device: torch.device, resume: Path | None, save: Path | None) -> None:
    """Prepares or resumes the run, takes its steps and reports."""
    console = Console(quiet=distributed.rank() != 0)
    with asked_wrongly(resume):
        trainer = train.prepare(job.recipe, device)
    if resume is not None:
        checkpoint.resume(trainer, resume)
    console.print(heading(job, trainer), highlight=False, soft_wrap=True)
    take_steps(job, trainer, resume or save, console)
    report(job, trainer, console)


def take_steps(job: Job, trainer: Trainer, folder: Path | None, console: Console) -> None:
    """Runs to the end, showing, logging and saving."""
    run, since, first = trainer.run(), trainer.step, distributed.rank() == 0
    if job.log_file is not None and first:
        run = logs.logged(run, Path(job.log_file), since)
    if job.tensorboard is not None and first:
        run = logs.boarded(run, Path(job.tensorboard), since)
    if folder is not None:
        run = checkpoint.saved(run, trainer, folder, job.to_json(folder), job.save_every)
    try:
        with stopping_on_signals(trainer):
            for progress in show.shown(run, console):
                if trainer.stopping and not trainer.finished:
                    stop(progress, folder)
    except OSError as error:
        if error.filename is None or trainer.step == since:
            raise
        where = f"step {trainer.step} of {trainer.steps}"
        raise Failure(f"{error.filename}: {error.strerror}, at {where}; {going_on(folder)}") from None


def stop(progress: Progress, folder: Path | None) -> NoReturn:
    """Ends a run that was interrupted."""
    if distributed.rank() != 0:
        raise typer.Exit(1)
    where = f"epoch {progress.epoch}, step {progress.step} of {progress.steps}, {show.describe(progress)}"
    raise Failure(f"interrupted at {where}; {going_on(folder)}")


def going_on(folder: Path | None) -> str:
    """How a run that has ended before its time can go on."""
    if folder is None:
        return "nothing is saved without --save"
    if not (folder / checkpoint.LAST).exists():
        return f"{folder} has no checkpoint yet"
    program = f"torchrun --nproc-per-node {distributed.size()} -m dlkernels" if distributed.size() > 1 else "dlkernels"
    return f"go on with: {program} train --resume {folder}"


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
def asked_wrongly(resume: Path | None = None) -> Iterator[None]:
    """Values that cannot be are errors of usage, but for what is wrong with a file, as that of a resumed run."""
    try:
        yield
    except DataError as error:
        raise Failure(str(error)) from None
    except ValueError as error:
        if resume is not None:
            raise Failure(f"{resume / checkpoint.LAST}: {error}") from None
        raise typer.BadParameter(str(error)) from None


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """What a run can fail of, as a failure of the command."""
    try:
        yield
    except (train.TrainingError, train.CheckpointError) as error:
        raise Failure(str(error)) from None
    except distributed.OtherRankError:
        raise typer.Exit(1) from None
    except ModuleNotFoundError as error:
        raise missing_package("this run", error) from None
