"""Records of a run: a line of JSON for each step, and TensorBoard's files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .settings import Progress


def record(progress: Progress) -> dict[str, Any]:
    """A step as one flat dictionary: losses by their names, validation figures with ``validation_`` before theirs."""
    facts = asdict(progress)
    losses, validation = facts.pop("losses"), facts.pop("validation")
    return {**facts, **losses, **{f"validation_{name}": value for name, value in validation.items()}}


def logged(run: Iterable[Progress], path: Path, since: int = 0) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, writing each as a line of JSON to ``path``.

    What the file has of the steps until ``since`` is kept, so that the log of a resumed run is that of one which was
    never interrupted. Each line is handed to the system at once: a killed process leaves no gap before its checkpoint.
    """
    if since:
        cut(path, since)
    with path.open("a" if since else "w", encoding="utf-8", buffering=1) as file:
        for progress in run:
            file.write(json.dumps(record(progress)) + "\n")
            yield progress


def conclude(path: Path, figures: Mapping[str, float]) -> None:
    """Adds the figures of the test part as the last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({f"test_{name}": value for name, value in figures.items()}) + "\n")


def cut(path: Path, step: int) -> None:
    """Leaves of a log the records until ``step``."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line).get("step", math.inf) > step:
                break
            end += len(line)
    os.truncate(path, end)


def boarded(run: Iterable[Progress], folder: Path, since: int = 0) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, writing them to ``folder`` for TensorBoard; what it has after ``since`` is void.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=since + 1 if since else None) as writer:
        for progress in run:
            writer.add_scalar("learning_rate", progress.learning_rate, progress.step)
            for name, value in progress.losses.items():
                writer.add_scalar(f"train/{name}", value, progress.step)
            for name, value in progress.validation.items():
                writer.add_scalar(f"validation/{name}", value, progress.step)
            yield progress
