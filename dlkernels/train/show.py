"""What a training run shows while it goes: a live bar on a terminal, plain lines anywhere else, records in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from .loop import Progress


def is_live(console: Console) -> bool:
    """Whether the output can be redrawn: a terminal, and nobody asked for plain text."""
    return console.is_terminal and not os.environ.get("CI") and not os.environ.get("NO_COLOR")


def describe(progress: Progress) -> str:
    """The figures of one step, in one line."""
    return (
        f"loss {progress.loss:.4f}  accuracy {progress.accuracy:.3f}  "
        f"{progress.examples / max(progress.seconds, 1e-9):,.0f} images/s"
    )


def end_of_epoch(progress: Progress) -> str:
    """The line printed after an epoch."""
    return (
        f"epoch {progress.epoch:>3}/{progress.epochs}  {describe(progress)}  test accuracy {progress.test_accuracy:.4f}"
    )


def shown(run: Iterable[Progress], console: Console) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, showing each: a bar that is redrawn, or a line for each epoch."""
    if not is_live(console):
        for progress in run:
            if progress.test_accuracy is not None:
                console.print(end_of_epoch(progress), highlight=False)
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
            if progress.test_accuracy is not None:
                bar.console.print(end_of_epoch(progress), highlight=False)
            yield progress


def logged(run: Iterable[Progress], path: Path) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, writing each as a line of JSON to ``path``, which is overwritten."""
    with path.open("w", encoding="utf-8") as file:
        for progress in run:
            file.write(json.dumps(asdict(progress)) + "\n")
            yield progress
