"""The ``dlkernels`` command: ``train`` a network, ``bench`` the operations, ``info`` about the installation.

Results go to standard output. An error is one line on standard error; the exit status is 0, 1 (it failed) or 2 (it was
asked for wrongly).
"""

from __future__ import annotations

import enum
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(f"dlkernels: the command line needs {missing.name}; run: {sys.executable} -m pip install 'dlkernels[cli]'")

import torch

from . import __version__, convert_check, info

app = typer.Typer(
    name="dlkernels",
    help="Hand-written deep-learning kernels for PyTorch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Failure(Exception):
    """The command could not do what it was asked; the message is for the user. Exit status 1."""


class Network(str, enum.Enum):
    """Networks that `train` knows."""

    lenet = "lenet"


class DataSet(str, enum.Enum):
    """Data sets that `train` knows."""

    digits = "digits"


class Backend(str, enum.Enum):
    """Whose operators compute."""

    dlkernels = "dlkernels"
    torch = "torch"


class Optimizer(str, enum.Enum):
    """What turns gradients into steps."""

    sgd = "sgd"
    adamw = "adamw"


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


def positive(value: float) -> float:
    """Refuses a number that is not above zero."""
    if not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"must be a positive number, got {value}")
    return value


@app.command(name="train")
def train_command(
    network: Annotated[Network, typer.Argument(help="What to train.")],
    data: Annotated[DataSet, typer.Option(help="What to train it on.")] = DataSet.digits,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20,
    batch_size: Annotated[int, typer.Option(min=2, help="Examples in a mini-batch.")] = 32,
    learning_rate: Annotated[float, typer.Option(callback=positive, help="Its peak; warm-up, then a cosine.")] = 0.05,
    optimizer: Annotated[Optimizer, typer.Option(help="SGD has Nesterov momentum 0.9.")] = Optimizer.sgd,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights, split and order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="So small a network gains nothing from more than one.")] = 1,
    backend: Annotated[Backend, typer.Option(help="Whose operators compute.")] = Backend.dlkernels,
    log: Annotated[Path | None, typer.Option(help="Write every step to this file, a line of JSON each.")] = None,
) -> None:
    """Train a network on real data; show how it goes and which operations took the time."""
    from . import train
    from .train import show

    torch.set_num_threads(threads)
    console = Console()
    settings = train.Settings(epochs, batch_size, learning_rate, optimizer.value, seed=seed)
    try:
        model, loss_function, split = train.lenet_on_digits(backend.value, seed)
    except ModuleNotFoundError as missing:
        raise Failure(
            f"the digits need {missing.name}; run: {sys.executable} -m pip install 'dlkernels[cli]'"
        ) from None
    console.print(
        f"{network.value} on {data.value}: {len(split.train_labels)} images to train, {len(split.test_labels)} to "
        f"test; {backend.value}, threads {threads}, seed {seed}",
        highlight=False,
        soft_wrap=True,
    )
    run = train.train(model, loss_function, split, settings)
    if log is not None:
        run = show.logged(run, log)
    last: train.Progress | None = None
    try:
        for last in show.shown(run, console):  # noqa: B007
            pass
    except KeyboardInterrupt:
        where = f"epoch {last.epoch}, step {last.step} of {last.steps}, {show.describe(last)}" if last else "the start"
        raise Failure(f"interrupted at {where}") from None
    except train.TrainingError as error:
        raise Failure(str(error)) from None
    assert last is not None
    console.print(f"test accuracy {last.test_accuracy:.4f} after {last.seconds:.1f} s of training", highlight=False)
    used = train.operation_times(train.some_steps(model, loss_function, split, settings))
    console.print(operations_table(used))
    counted = [entry for entry in used if entry.calls]
    console.print(
        f"{sum(entry.on_dlkernels for entry in counted)} of {sum(entry.calls for entry in counted)} calls of "
        f"{', '.join(entry.name for entry in counted)} ran on dlkernels",
        highlight=False,
        soft_wrap=True,
    )


def wide_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def operations_table(used: list[Any]) -> Table:
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


@app.command(name="bench")
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
    from . import bench

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
        except ModuleNotFoundError as missing:
            hint = f"run: {sys.executable} -m pip install 'dlkernels[plot]'"
            raise Failure(f"the plot needs {missing.name}; {hint}") from None
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


@app.command(name="info")
def info_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell versions, instruction sets and build facts, and test every operation."""
    facts = info.report()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print_facts(facts)
    failed = [check["name"] for check in facts["self_test"] if not check["passed"]]
    if failed:
        raise Failure(f"the self-test failed: {', '.join(failed)}")


def print_facts(facts: dict[str, Any]) -> None:
    """The report in lines, for a person."""
    for name in ("dlkernels", "torch", "python", "system"):
        print(f"{name:<16}{facts[name]}")
    print(f"{'processor':<16}{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads in use")
    print(f"{'instructions':<16}{facts['isa']} (available: {', '.join(facts['available_isas'])})")
    print(f"{'DLKERNELS_ISA':<16}{facts['DLKERNELS_ISA'] or 'not set'}")
    for name, value in facts["build"].items():
        print(f"{'build':<16}{name}: {', '.join(value) if isinstance(value, list) else value}")
    for check in facts["self_test"]:
        outcome = "ok" if check["passed"] else "FAILED"
        error = (
            check["message"] if check["error"] is None else f"error {check['error']:.1e}, bound {check['bound']:.0e}"
        )
        print(f"{'self-test':<16}{check['name']}: {outcome}, {error}, {1e3 * check['seconds']:.0f} ms")


def print_version(wanted: bool) -> None:
    """For ``--version``."""
    if wanted:
        print(f"dlkernels {__version__}")
        raise typer.Exit


app.command(name="convert-check")(convert_check.convert_check_command)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    """Hand-written deep-learning kernels for PyTorch."""


def run(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    try:
        status = app(arguments, prog_name="dlkernels", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # Whoever read the output has gone; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Failure as failure:
        message, status = str(failure), 1
    except OSError as error:
        message, status = f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), 1
    except (KeyboardInterrupt, typer.Abort):
        message, status = "interrupted", 1
    except Exception as error:
        # typer's own errors, about the command line itself; their base class has had several homes.
        if not hasattr(error, "format_message"):
            raise
        message, status = error.format_message(), getattr(error, "exit_code", 2)
    if message == "Missing command.":
        message = "which command? train, bench or info; --help tells more"
    print("dlkernels: " + " ".join(message.split()), file=sys.stderr)
    return status


def main() -> NoReturn:
    """The ``dlkernels`` command."""
    sys.exit(run(sys.argv[1:]))
