"""Checkpoints: all of a run's state in one file that is there whole or not at all, without pickle.

A folder holds ``last.safetensors``, from which the run goes on, and ``best.safetensors``, the weights alone: those with
the smallest validation loss so far (of a network without one, those of the last epoch). Tensors are stored as
safetensors, everything else as JSON in the same file's header.

A file is written beside its place, forced to the disk, and then renamed, which replaces the old one in one step; the
folder's entry is forced to the disk too. The best weights are written before the state that counts on them, so that
whenever the process is killed, the two fit: best weights newer than the state are those that the run comes to again.
Where there is no room, what was begun is removed, the old file stays, and the run ends.

Only one run at a time saves into a folder: it holds a lock on ``.lock`` in it, which ends with the process.

Nothing in a file is trusted: it may be damaged, or from somebody else. Every tensor has a checksum, facts have types
and ranges, and tensors must be those that the network and its optimiser can have.

On a processor the run goes on bit for bit: everything that is drawn or computed depends on the state, the settings and
the data. On a GPU this holds as far as torch's own operators there give the same bits twice.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import typed_json, writing
from . import distributed
from .loop import Trainer
from .settings import Progress
from .state import State, check_like

LAST = "last.safetensors"
BEST = "best.safetensors"
LOCK = ".lock"
KEY = "dlkernels"  # of the facts in the header
CHECKSUM = "dlkernels.crc32"  # of their text
TENSORS = "tensors"  # among the facts: the checksum of each


class CheckpointError(Exception):
    """A checkpoint is missing, cannot be read, or belongs to another run; the message names the file or its folder."""


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
        CheckpointError: another run saves into the folder.
        ModuleNotFoundError: safetensors is not installed.
        OSError: a file cannot be written; the error names it. What was saved before is as it was.
    """
    import safetensors  # noqa: F401  where it is missing, no step is taken

    if trainer.finished:  # the folder may be one that cannot be written to
        yield from run
        return
    with held(folder):
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


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """In it no other run saves into ``folder``, which is made if it is not there. All ranks must enter it together.

    On a file system without locks nobody is kept out.

    Raises:
        CheckpointError: another run does so already.
        OSError: nothing can be written there.
    """
    found: list[int] = []
    distributed.in_rank_0(lambda: found.append(lock(folder)))
    try:
        yield
    finally:
        for descriptor in found:
            if is_open_at(descriptor, folder / LOCK):
                with suppress(OSError):
                    (folder / LOCK).unlink()
            os.close(descriptor)


def lock(folder: Path) -> int:
    """The locked file of ``folder``, open; the lock ends with it, and with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        if not writing.locked(descriptor):
            os.close(descriptor)
            raise CheckpointError(f"{folder}: another run is saving into this folder")
        if is_open_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its holder has ended meanwhile, and taken it away


def is_open_at(descriptor: int, path: Path) -> bool:
    """Whether ``descriptor`` is of the file at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def resume(trainer: Trainer, folder: Path) -> None:
    """Puts ``trainer`` where the run that was saved in ``folder`` stood.

    Raises:
        CheckpointError: a file is missing or damaged, or the network is another.
        TrainingError: the data or the number of ranks is another.
    """
    last, best = folder / LAST, folder / BEST
    tensors, facts = read(last)
    weights = None
    with wrong_in(last):
        state = State.from_json(facts.get("state"))
    if trainer.settings.patience is not None and state.best_step > 0:
        weights, about = read(best)
        with wrong_in(best):
            check_like(weights, trainer.evaluated.state_dict(), "weights")
            step = typed_json.checked(about.get("step"), int, "step")
        if step < state.best_step:
            raise CheckpointError(f"{best}: these weights are older than {last} says")
    with wrong_in(last):
        trainer.load(tensors, facts["state"], weights)


@contextmanager
def wrong_in(path: Path) -> Iterator[None]:
    """What is found wrong in it is wrong with the file ``path``."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replaces ``path`` in one step by a file of ``tensors`` and ``facts``; rank 0 does, and all must call it together.

    Raises:
        OSError: it cannot be written; the error names ``path``, which is as it was.
    """
    distributed.in_rank_0(lambda: replace(path, separate(tensors), facts))


def replace(path: Path, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    """:func:`write` in this process, of tensors that can be stored."""
    from safetensors.torch import save_file

    text = json.dumps({**facts, TENSORS: {name: checksum(tensor) for name, tensor in tensors.items()}})
    with writing.replacing(path) as place:
        save_file(tensors, place, {KEY: text, CHECKSUM: str(zlib.crc32(text.encode()))})


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts in ``path``.

    Raises:
        CheckpointError: the file is missing, damaged, or none of :func:`write`.
    """
    with opened(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        facts = facts_of(file)
    with wrong_in(path):
        check_checksums(tensors, typed_json.checked(facts.get(TENSORS), dict[str, int], TENSORS))
    return tensors, facts


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
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: this is no checkpoint, or a damaged one: {error}") from None


def facts_of(file: Any) -> dict[str, Any]:
    """What :func:`write` put into the header."""
    header = file.metadata() or {}
    text = header[KEY]
    if header.get(CHECKSUM, str(zlib.crc32(text.encode()))) != str(zlib.crc32(text.encode())):
        raise ValueError("the facts in its header have another checksum than when they were written")
    return typed_json.checked(typed_json.parse(text), dict, "its header")


def check_checksums(tensors: Mapping[str, Tensor], expected: Mapping[str, int]) -> None:
    """Raises a ValueError about the first tensor that is not as it was written."""
    for name in (*expected, *tensors):
        if name not in tensors or name not in expected:
            raise ValueError(f"{name!r} is {'missing' if name in expected else 'not one that was written'}")
        if checksum(tensors[name]) != expected[name]:
            raise ValueError(f"{name!r} is damaged: it has another checksum than when it was written")


def checksum(tensor: Tensor) -> int:
    """A number that changes with type, shape and elements of a tensor that is stored."""
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), zlib.crc32(kind))  # type: ignore[arg-type]


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
