"""Records of a run: a line of JSON for each step, and TensorBoard's files.

Each step is handed to the system at once, whole or not at all: a killed process leaves no gap before its checkpoint, a
full disk no half of a line.
"""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import typed_json
from ..writing import Records
from .settings import Progress, TrainingError


def record(progress: Progress) -> dict[str, Any]:
    """A step as one flat dictionary: losses by their names, validation figures with ``validation_`` before theirs."""
    facts = asdict(progress)
    losses, validation = facts.pop("losses"), facts.pop("validation")
    return {**facts, **losses, **{f"validation_{name}": value for name, value in validation.items()}}


def logged(run: Iterable[Progress], path: Path, since: int = 0) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, writing each as a line of JSON to ``path``.

    What the file has of the steps until ``since`` is kept, so that the log of a resumed run is that of one which was
    never interrupted.

    Raises:
        OSError: the file cannot be written, or another run writes to it; the error names it.
        TrainingError: until ``since`` it has something other than records of steps.
    """
    with Records(path, keep=read(path, since)[0]) as file:
        for progress in run:
            file.append(line(record(progress)))
            yield progress


def conclude(path: Path, figures: Mapping[str, float]) -> None:
    """Adds the figures of the test part as the last line.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    with Records(path) as file:
        file.append(line({f"test_{name}": value for name, value in figures.items()}))


def line(facts: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return (json.dumps(facts) + "\n").encode()


def read(path: Path, step: int) -> tuple[int, dict[str, Any]]:
    """How many bytes of a log its records until ``step`` are, and the last of these; empty where there are none.

    Raises:
        OSError: the file cannot be read.
        TrainingError: what comes before the end of that is no record of a step.
    """
    end = 0
    last: dict[str, Any] = {}
    if step == 0 or not path.is_file():
        return end, last
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break  # of a process that was cut off
            try:
                facts = typed_json.checked(typed_json.parse(text), dict, "it")
                own = typed_json.checked(facts.get("step", step + 1), int, "step")  # without one: the test part
            except ValueError as error:
                raise TrainingError(f"{path}, line {number}: this is no record of a step: {error}") from None
            if own > step:
                break
            end, last = end + len(text), facts
    return end, last


def belongs_to(path: Path, step: int, seconds: float) -> bool:
    """Whether a file is the log of the run that took ``step`` steps in ``seconds``, to the last bit of the clock."""
    try:
        _, last = read(path, step)
    except (OSError, TrainingError):
        return False
    return step > 0 and last.get("step") == step and last.get("seconds") == seconds


def boarded(run: Iterable[Progress], folder: Path, since: int = 0) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, writing them to ``folder`` for TensorBoard; what it has after ``since`` is void.

    Raises:
        ModuleNotFoundError: tensorboard is not installed.
        OSError: nothing can be written there; the error names what.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    # TensorBoard's own writer does this in a thread, whose errors nobody can catch.
    def events(*facts: Any) -> bytes:
        content = io.BytesIO()
        for event in facts:
            event.wall_time = time.time()
            RecordWriter(content).write(event.SerializeToString())
        return content.getvalue()

    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 10**9:010}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
    with Records(folder / name) as file:
        file.append(events(Event(file_version="brain.Event:2")))
        if since:
            file.append(events(Event(step=since + 1, session_log=SessionLog(status=SessionLog.START))))
        for progress in run:
            values = {
                "learning_rate": progress.learning_rate,
                **{f"train/{name}": value for name, value in progress.losses.items()},
                **{f"validation/{name}": value for name, value in progress.validation.items()},
            }
            scalars = [Summary(value=[Summary.Value(tag=tag, simple_value=value)]) for tag, value in values.items()]
            file.append(events(*(Event(step=progress.step, summary=scalar) for scalar in scalars)))
            yield progress
