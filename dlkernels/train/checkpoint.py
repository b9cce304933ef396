"""Checkpoints: all of a run's state in one file that is there whole or not at all, without pickle.

A folder holds ``last.safetensors``, from which the run goes on, and ``best.safetensors``, the weights alone: those with
the smallest validation loss so far (of a network without one, those of the last epoch). Tensors are stored as
safetensors, everything else as JSON in the same file's header.

A file is written beside its place under another name, forced to the disk, and then renamed, which replaces the old one
in one step; the folder's entry is forced to the disk too. The best weights are written before the state that counts on
them, so that whenever the process is killed, the two fit: best weights newer than the state are those that the run
comes to again.

On a processor the run goes on bit for bit: everything that is drawn or computed depends on the state, the settings and
the data. On a GPU this holds as far as torch's own operators there give the same bits twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from . import distributed
from .loop import Trainer
from .settings import Progress

LAST = "last.safetensors"
BEST = "best.safetensors"
KEY = "dlkernels"  # of the facts in the header


class CheckpointError(Exception):
    """A checkpoint is missing or cannot be read; the message names the file."""


def saved(
    run: Iterable[Progress], trainer: Trainer, folder: Path, description: Mapping[str, Any], every: int | None = None
) -> Iterator[Progress]:
    """Passes the steps of ``run`` on, saving before that: after each epoch, at the end, and when the run is to stop.

    Args:
        run: steps of ``trainer``.
        folder: made if it is not there. Only rank 0 writes.
        description: what the network and its data are built from, for who resumes; JSON.
        every: also after every so many steps.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
    """
    import safetensors  # noqa: F401  where it is missing, no step is taken

    folder.mkdir(parents=True, exist_ok=True)
    for progress in run:
        due = every is not None and progress.step % every == 0
        if progress.validation and trainer.best_step == progress.step:
            save_best(trainer, folder, description)
        if due or progress.validation or trainer.stopping:
            save_last(trainer, folder, description)
        yield progress


def save_last(trainer: Trainer, folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the state of ``trainer``. All ranks must call it together."""
    tensors, facts = trainer.state()
    write(folder / LAST, tensors, {"run": description, "state": facts})


def save_best(trainer: Trainer, folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the evaluated weights."""
    write(folder / BEST, trainer.evaluated.state_dict(), {"run": description, "step": trainer.step})


def resume(trainer: Trainer, folder: Path) -> None:
    """Puts ``trainer`` where the run that was saved in ``folder`` stood.

    Raises:
        CheckpointError: a file is missing or damaged, or the network is another.
        TrainingError: the data or the number of ranks is another.
    """
    tensors, facts = read(folder / LAST)
    best = None
    if trainer.settings.patience is not None and facts["state"]["best_step"] > 0:
        best, about = read(folder / BEST)
        if about["step"] < facts["state"]["best_step"]:
            raise CheckpointError(f"{folder / BEST}: these weights are older than {folder / LAST} says")
    try:
        trainer.load(tensors, facts["state"], best)
    except ValueError as error:
        raise CheckpointError(f"{folder / LAST}: {error}") from None


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replaces ``path`` in one step by a file of ``tensors`` and ``facts``. Other ranks than 0 write nothing."""
    from safetensors.torch import save_file

    if distributed.rank() != 0:
        return
    beside = path.with_name(f".{path.name}.unfinished")
    beside.touch()
    permissions = beside.stat().st_mode  # those of new files here; safetensors makes its files private
    save_file(separate(tensors), beside, {KEY: json.dumps(facts)})
    beside.chmod(permissions)
    force_to_disk(beside)
    os.replace(beside, path)
    force_to_disk(path.parent)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts in ``path``.

    Raises:
        CheckpointError: the file is missing, damaged, or none of :func:`write`.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, facts_of(file)  # noqa: SIM118


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone.

    Raises:
        CheckpointError: the file is missing, damaged, or none of :func:`write`.
    """
    with opened(path) as file:
        return facts_of(file)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file as safetensors reads it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: this is no checkpoint, or a damaged one: {error}") from None


def facts_of(file: Any) -> dict[str, Any]:
    """What :func:`write` put into the header."""
    return json.loads((file.metadata() or {})[KEY])


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they can be stored: on the processor, contiguous, and none sharing memory with another."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        found[name] = own.clone() if memory in seen else own
        seen.add(memory)
    return found


def force_to_disk(path: Path) -> None:
    """Waits until a file, or the entries of a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
