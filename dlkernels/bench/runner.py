"""A benchmark run: every case of the chosen columns, its peers, and what the machine could have done."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import info
from ..train.show import is_live
from .harness import (
    BACKWARD,
    BEST,
    BOTH,
    FORWARD,
    FULL,
    OURS,
    PROCESSOR,
    QUICK,
    TORCH,
    Case,
    Ceilings,
    Result,
    dtype_name,
    measure,
    measure_ceilings,
)

HUGE_PAGES = "torch, huge pages"
PROVIDERS = (OURS, TORCH, "compile", "thp")
MODES = {"forward": FORWARD, "backward": BACKWARD, "both": BOTH}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}  # measured where none is chosen

Item = TypeVar("Item")


class BenchError(Exception):
    """A part of the run could not be measured; the message says which and why."""


@dataclass
class Run:
    """Everything that one run found."""

    environment: dict[str, Any]
    ceilings: Ceilings
    quick: bool
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """The cases whose results differ from torch's."""
        return [
            f"{r.group}: {r.name}, {r.dtype}, {r.direction} (relative difference {r.error:.1e})"
            for r in self.results
            if not r.same
        ]


def find_cases(columns: Sequence[str], dtypes: Sequence[torch.dtype], quick: bool, gpu: bool = False) -> Iterator[Case]:
    """The cases of the columns, each from the module of that name; those of a GPU are as large as it needs."""
    for column in columns:
        yield from importlib.import_module(f"{__package__}.{column}").cases(tuple(dtypes), quick, gpu)


def letters(text: str) -> str:
    """What is compared of a name: `ResNet-50` is `resnet50`."""
    return "".join(filter(str.isalnum, text.lower()))


def matching(cases: Sequence[Case], shapes: str) -> list[Case]:
    """The cases whose class or name (network, layer, sizes) holds ``shapes``; letters and digits count, not their case.

    Raises:
        BenchError: there is none; the message names what there is.
    """
    wanted = letters(shapes)
    found = [case for case in cases if wanted in letters(case.group) or wanted in letters(case.name)]
    if not found:
        names = "; ".join(sorted({case.name.partition(" (")[0] for case in cases}))
        groups = "; ".join(sorted({case.group for case in cases}))
        raise BenchError(f"no shape holds {shapes!r}: there are {names}; the classes are {groups}")
    return found


@contextlib.contextmanager
def strict_float32(device: torch.device) -> Iterator[None]:
    """On a GPU: torch's convolutions and LSTMs in full float32, like ours, by the fastest of cuDNN's kernels."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        yield


def describe(results: list[Result]) -> str:
    """One case's outcome in a line."""
    first = results[0]
    peer = BEST if any(BEST in r.ratio for r in results) else TORCH
    ratios = ", ".join(
        f"{r.direction} {r.ratio[peer]:.2f}x (spread {r.spread[OURS]:.0%})" if r.same else f"{r.direction} DIFFERS"
        for r in results
    )
    return f"{first.group}, {first.dtype}: {first.name}: {ratios}"


def progressing(items: Sequence[Item], console: Console, label: Callable[[Item], str]) -> Iterator[Item]:
    """Passes ``items`` on, with a bar that tells how far they are where ``console`` can be redrawn."""
    layout = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*layout, console=console, transient=True, disable=not is_live(console)) as bar:
        task = bar.add_task("", total=len(items))
        for item in items:
            bar.update(task, description=label(item))
            yield item
            bar.advance(task)


def run(
    columns: Sequence[str],
    *,
    quick: bool = False,
    dtypes: Sequence[str] = DTYPES["cpu"],
    shapes: str = "",
    providers: Sequence[str] = (),
    modes: Sequence[str] = ("forward", "both"),
    device: torch.device = PROCESSOR,
    console: Console | None = None,
) -> Run:
    """Measures the cases of ``columns`` against torch as it is, and against the other ``providers``.

    Args:
        columns: some of :data:`dlkernels.operations.OPERATIONS`.
        quick: one shape a class, and fewer samples.
        dtypes: element types to measure.
        shapes: only cases whose class or name holds this text; all for an empty one.
        providers: ``"compile"`` adds torch.compile to the contenders; ``"thp"`` repeats the run in a process whose
            allocator asks for huge pages. ``"dlkernels"`` and ``"torch"`` always are.
        modes: some of :data:`MODES`: forward alone, backward alone, forward and backward.
        device: where the tensors are; on a GPU, one of those that the build has kernels for.
        console: where the progress goes; nowhere if not given.

    Raises:
        BenchError: there is nothing to measure, or a part could not be.
    """
    console = console or Console(quiet=True)
    types = [getattr(torch, name) for name in dtypes]
    cases = list(find_cases(columns, types, quick, gpu=device.type == "cuda"))
    if not cases:
        usual = ", ".join(DTYPES[device.type])
        raise BenchError(f"{', '.join(columns)}: no shape is measured in {', '.join(dtypes)}; most are in {usual}")
    cases = matching(cases, shapes)
    directions = [MODES[mode] for mode in modes]
    start = time.perf_counter()
    found = Run(info.environment(device), measure_ceilings(types, quick, device), quick)
    with strict_float32(device):
        for case in progressing(cases, console, lambda case: f"{case.group}, {dtype_name(case.dtype)}"):
            budget, compiled = QUICK if quick else FULL, "compile" in providers
            results = measure(case, found.ceilings, budget, compiled, device, directions)
            found.results += results
            console.print(describe(results), highlight=False, soft_wrap=True)
    if "thp" in providers:
        console.print("the same with THP_MEM_ALLOC_ENABLE=1", highlight=False)
        add_huge_pages(found, dtypes, modes, shapes)
    found.seconds = time.perf_counter() - start
    return found


def add_huge_pages(found: Run, dtypes: Sequence[str], modes: Sequence[str], shapes: str) -> None:
    """Adds the ratios of a run in which torch's allocator, ours too, asks for huge pages.

    Raises:
        BenchError: that run did not end well.
    """
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.json")
        for column in dict.fromkeys(result.column for result in found.results):
            command = [sys.executable, "-m", "dlkernels", "bench", column, "--json", str(path)]
            command += ["--threads", str(torch.get_num_threads())]
            command += ["--quick"] if found.quick else []
            command += ["--dtype", ",".join(dtypes), "--mode", ",".join(modes), "--shapes", shapes]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if not path.exists():
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise BenchError(f"the run with huge pages stopped with status {done.returncode}: {last}")
            for entry in json.loads(path.read_text())["results"]:
                key = (entry["group"], entry["name"], entry["dtype"], entry["direction"])
                ratios[key] = entry["ratio"].get(TORCH)
            path.unlink()
    for result in found.results:
        ratio = ratios.get((result.group, result.name, result.dtype, result.direction))
        if ratio is not None:
            result.ratio[HUGE_PAGES] = ratio
