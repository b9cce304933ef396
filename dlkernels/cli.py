"""The ``dlkernels`` command. Its commands lie in :mod:`dlkernels.commands`.

Results go to standard output. An error is one line on standard error; the exit status is 0, 1 (it failed) or 2 (it was
asked for wrongly).
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, NoReturn

try:
    import rich  # noqa: F401
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as missing:
    sys.exit(f"dlkernels: the command line needs {missing.name}; run: {sys.executable} -m pip install 'dlkernels[cli]'")

from . import __version__
from .commands import Failure
from .commands.bench import bench_command, bench_compare_command
from .commands.convert_check import convert_check_command
from .commands.info import info_command
from .commands.models import models_command
from .commands.train import train_command


class Commands(TyperGroup):
    """Commands of one word or two: `bench compare` is one beside `bench`, which takes an operation in its place."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name = " ".join(args[:2])
        command = self.get_command(ctx, name)
        return super().resolve_command(ctx, args) if command is None else (name, command, args[2:])


app = typer.Typer(
    name="dlkernels",
    cls=Commands,
    help="Hand-written deep-learning kernels for PyTorch.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, command in {
    "train": train_command,
    "models": models_command,
    "bench": bench_command,
    "bench compare": bench_compare_command,
    "convert-check": convert_check_command,
    "info": info_command,
}.items():
    app.command(name=name)(command)


def print_version(wanted: bool) -> None:
    """For ``--version``."""
    if wanted:
        print(f"dlkernels {__version__}")
        raise typer.Exit


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
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        give_up_output()
        return 1
    except Failure as failure:
        message, status = str(failure), 1
    except OSError as error:
        where = error.filename or ("standard output" if give_up_output() else "")
        message, status = f"{where}: {error.strerror or error}".removeprefix(": "), 1
    except (KeyboardInterrupt, typer.Abort):
        message, status = "interrupted", 1
    except Exception as error:
        # typer's own errors, about the command line itself; their base class has had several homes.
        if not hasattr(error, "format_message"):
            raise
        message, status = error.format_message(), getattr(error, "exit_code", 2)
    if message == "Missing command.":
        message = "which command? train, models, bench, convert-check or info; --help tells more"
    process = f"process {os.environ['RANK']}: " if os.environ.get("RANK", "0") != "0" else ""
    print(f"dlkernels: {process}{printable(' '.join(message.split()))}", file=sys.stderr)
    return status


def give_up_output() -> bool:
    """Whether standard output takes nothing any more; what is still buffered is then dropped, or exit raises again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def printable(text: str) -> str:
    """A text without what would control a terminal: messages hold what files do."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def main() -> NoReturn:
    """The ``dlkernels`` command."""
    sys.exit(run(sys.argv[1:]))
