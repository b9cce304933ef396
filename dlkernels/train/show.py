"""What a training run shows while it goes: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from .settings import Progress


def is_live(console: Console) -> bool:
    """Whether the output can be redrawn: a terminal, and nobody asked for plain text."""
    return console.is_terminal and not os.environ.get("CI") and not os.environ.get("NO_COLOR")


def figures(values: Mapping[str, float]) -> str:
    """Figures by their names, in one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def describe(progress: Progress) -> str:
    """The losses of one step and the speed so far."""
    return f"{figures(progress.losses)}  {progress.examples / max(progress.seconds, 1e-9):,.0f} examples/s"


def end_of_epoch(progress: Progress) -> str:
    """The line printed after an epoch."""
    return (
        f"epoch {progress.epoch:>3}/{progress.epochs}  {describe(progress)}  validation {figures(progress.validation)}"
    )


def shown(run: Iterable[Progress], console: Console) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, showing each: a bar that is redrawn, or a line for each epoch."""
    if not is_live(console):
        for progress in run:
            if progress.validation:
                console.print(end_of_epoch(progress), highlight=False, soft_wrap=True)
            yield progress
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    with ProgressBar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("train", total=None, epoch="1", figures="")
        for progress in run:
            epoch = f"{progress.epoch}/{progress.epochs}"
            bar.update(task, completed=progress.step, total=progress.steps, epoch=epoch, figures=describe(progress))
            if progress.validation:
                bar.console.print(end_of_epoch(progress), highlight=False, soft_wrap=True)
            yield progress
