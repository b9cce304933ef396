"""``dlkernels bench``: the operations against torch's."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import info
from . import Failure, missing_package, wide_console


class Operation(str, enum.Enum):
    """Operations that `bench` measures."""

    conv2d = "conv2d"
    batch_norm = "batch_norm"
    lstm = "lstm"
    linear = "linear"
    cross_entropy = "cross_entropy"
    linear_cross_entropy = "linear_cross_entropy"
    attention = "attention"


class ElementType(str, enum.Enum):
    """Element types that `bench` measures."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(str, enum.Enum):
    """Where `bench` measures."""

    cpu = "cpu"
    cuda = "cuda"


class Peer(str, enum.Enum):
    """What `bench` compares with, besides torch as it is."""

    thp = "thp"
    compile = "compile"


def bench_command(
    operation: Annotated[Operation | None, typer.Argument(help="Which one; all if not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One shape a class, in well under a minute.")] = False,
    dtype: Annotated[ElementType | None, typer.Option(help="Only this element type.")] = None,
    device: Annotated[Device, typer.Option(help="Where; cuda needs a GPU and a build with CUDA kernels.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch's default if not given.")] = None,
    peers: Annotated[
        list[Peer] | None,
        typer.Option(help="Also against torch with huge pages (thp) or torch.compile; may be repeated."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the classes' ratios (png, svg or pdf).")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write the tables as markdown, with the figures beside it.")
    ] = None,
) -> None:
    """Measure the operations against torch's, interleaved, on shapes of real networks."""
    from .. import bench

    if plot is not None and plot.suffix not in bench.PLOT_FORMATS:
        raise typer.BadParameter(f"must end in {', '.join(bench.PLOT_FORMATS)}, got {plot}", param_hint="--plot")
    if threads is not None:
        torch.set_num_threads(threads)
    for path in (json_file, plot, report):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    chosen = [operation.value] if operation else list(bench.COLUMNS)
    dtypes = [dtype.value] if dtype else bench.DTYPES[device.value]
    console = wide_console()
    if device is Device.cuda:
        check_cuda(peers or [])
    try:
        run = bench.run(
            chosen,
            quick=quick,
            dtypes=dtypes,
            peers=[peer.value for peer in peers or []],
            device=torch.device(device.value),
            console=console,
        )
    except bench.BenchError as error:
        raise Failure(str(error)) from None
    console.print(bench.summary_table(run))
    if json_file is not None:
        bench.write_json(run, json_file)
    if plot is not None:
        try:
            bench.write_plot(run, plot)
        except ModuleNotFoundError as error:
            raise missing_package("the plot", error) from None
    if report is not None:
        bench.write_report(run, report)
    if run.wrong:
        raise Failure(f"{len(run.wrong)} results differ from torch's: {'; '.join(run.wrong)}")


def check_cuda(peers: list[Peer]) -> None:
    """Refuses to measure on a GPU that is not there, that this build has nothing for, or against what is of no GPU."""
    if Peer.thp in peers:
        raise typer.BadParameter("huge pages are the processor's", param_hint="--peers")
    if not torch.cuda.is_available():
        raise Failure("--device cuda: torch finds no GPU here")
    if info.build_facts().get("cuda") is None:
        raise Failure("--device cuda: this build has no CUDA kernels; run: DLKERNELS_CUDA=1 pip install .")
