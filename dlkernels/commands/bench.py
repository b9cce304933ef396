"""``dlkernels bench``: the operations against torch's; ``dlkernels bench compare``: one such run against another."""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import info
from ..operations import OPERATIONS
from ..writing import naming
from . import MOST_THREADS, Failure, missing_package, wide_console


class Operation(str, enum.Enum):
    """Operations that `bench` measures."""

    conv2d = "conv2d"
    batch_norm = "batch_norm"
    lstm = "lstm"
    linear = "linear"
    cross_entropy = "cross_entropy"
    linear_cross_entropy = "linear_cross_entropy"
    attention = "attention"


class Device(str, enum.Enum):
    """Where `bench` measures."""

    cpu = "cpu"
    cuda = "cuda"


SHORT_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
SHORT_MODES = {"fwd": "forward", "bwd": "backward", "full": "both"}
TYPES = tuple(SHORT_TYPES.values())


def listed(option: str, text: str, known: Sequence[str], short: Mapping[str, str] | None = None) -> list[str]:
    """The names of a list with commas, each one of ``known`` or ``short`` for one."""
    names = [(short or {}).get(name, name) for name in map(str.strip, text.split(","))]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)
    return list(dict.fromkeys(names))


def bench_command(
    operation: Annotated[Operation | None, typer.Argument(help="Which one; all if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape a class, in well under a minute.")] = False,
    shapes: Annotated[
        str, typer.Option(metavar="TEXT", help="Only where network, layer, sizes or class hold this, as in resnet50.")
    ] = "",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPES", help="Only these, with commas: bfloat16, float16, float32, float64 (bf16, ...)."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(metavar="MODES", help="forward (fwd): without gradients; backward (bwd): alone; both (full)."),
    ] = "forward,both",
    device: Annotated[Device, typer.Option(help="Where; cuda needs a GPU and a build with CUDA kernels.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="Torch's default if not given.")] = None,
    providers: Annotated[
        str,
        typer.Option(metavar="NAMES", help="These two are always there; compile and thp (huge pages) may come beside."),
    ] = "dlkernels,torch",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the classes' ratios (png, svg or pdf).")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the tables as markdown, with the figures beside it.")
    ] = None,
) -> None:
    """Measure the operations against torch's, interleaved, on shapes of real networks.

    `dlkernels bench compare` says what changed between two files that --json wrote.
    """
    from .. import bench

    if plot is not None and plot.suffix not in bench.PLOT_FORMATS:
        raise typer.BadParameter(f"must end in {', '.join(bench.PLOT_FORMATS)}, got {plot}", param_hint="--plot")
    dtypes = listed("--dtype", dtype, TYPES, SHORT_TYPES) if dtype else bench.DTYPES[device.value]
    modes = listed("--mode", mode, tuple(bench.MODES), SHORT_MODES)
    chosen_providers = listed("--providers", providers, bench.PROVIDERS)
    if threads is not None:
        torch.set_num_threads(threads)
    for path in (json_file, plot, report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            check_writable(path)
    chosen = [operation.value] if operation else list(OPERATIONS)
    console = wide_console()
    if device is Device.cuda:
        check_cuda(chosen_providers)
    try:
        run = bench.run(
            chosen,
            quick=quick,
            dtypes=dtypes,
            shapes=shapes,
            providers=chosen_providers,
            modes=modes,
            device=torch.device(device.value),
            console=console,
        )
    except bench.BenchError as error:
        raise Failure(str(error)) from None
    console.print(bench.summary_table(run))
    writers = ((bench.write_json, json_file), (bench.write_plot, plot), (bench.write_report, report))
    failures = []
    for write, path in writers:
        try:
            if path is not None:
                write(run, path)
        except ModuleNotFoundError as error:
            failures.append(str(missing_package("the plot", error)))
        except OSError as error:  # what was measured is in the other files
            failures.append(f"{error.filename}: {error.strerror}")
    if failures:
        raise Failure("; ".join(failures))
    if run.wrong:
        raise Failure(f"{len(run.wrong)} results differ from torch's: {'; '.join(run.wrong)}")


def check_writable(path: Path) -> None:
    """Refuses a path that nothing can be written to, before anything is measured.

    Raises:
        OSError: it is a folder, or nothing can be made beside it; the error names it.
    """
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not path.exists():
            path.touch()
            path.unlink()


def check_cuda(providers: list[str]) -> None:
    """Refuses to measure on a GPU that is not there, that this build has nothing for, or against what is of no GPU."""
    if "thp" in providers:
        raise typer.BadParameter("huge pages are the processor's", param_hint="--providers")
    if not torch.cuda.is_available():
        raise Failure("--device cuda: torch finds no GPU here")
    if info.build_facts().get("cuda") is None:
        raise Failure("--device cuda: this build has no CUDA kernels; run: DLKERNELS_CUDA=1 pip install .")


def bench_compare_command(
    first: Annotated[Path, typer.Argument(help="What --json wrote before.")],
    second: Annotated[Path, typer.Argument(help="What --json wrote after.")],
    threshold: Annotated[float, typer.Option(min=0, help="Percent that a case may become slower.")] = 5.0,
) -> None:
    """Compare two runs of bench; fails where our time over torch's grew past the threshold."""
    from .. import bench

    try:
        before, after = bench.read_json(first), bench.read_json(second)
    except ValueError as error:
        raise Failure(str(error)) from None
    found = bench.compare(before, after)
    if not found.changes and not found.wrong:
        raise Failure(f"{first} and {second} have no case in common")
    console = wide_console()
    for path, run in ((first, before), (second, after)):
        console.print(f"{path}: {bench.circumstances(run.environment)}", highlight=False, soft_wrap=True, markup=False)
    console.print(bench.comparison_table(found, threshold / 100))
    for path, cases in ((first, found.only_first), (second, found.only_second)):
        for case in cases:
            console.print(f"only in {path}: {case}", highlight=False, soft_wrap=True, markup=False)
    if found.wrong:
        raise Failure(f"{second}: {len(found.wrong)} results differ from torch's: {'; '.join(found.wrong)}")
    slower = found.slower(threshold / 100)
    if slower:
        worst = max(slower, key=lambda change: change.relative)
        raise Failure(
            f"{len(slower)} of {len(found.changes)} cases are more than {threshold:g} % slower against torch, the most "
            f"{worst.case} ({worst.relative:+.1%})"
        )
