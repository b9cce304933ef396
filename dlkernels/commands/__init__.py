"""The commands of ``dlkernels``, a file for each, and what they share."""

from __future__ import annotations

import sys

from rich.console import Console

# Which extra brings a package that a command may miss.
EXTRAS = {"sklearn": "cli", "matplotlib": "plot", "safetensors": "train", "tensorboard": "train", "PIL": "train"}

MOST_THREADS = 4096  # more is a mistake, and some of them end the process


class Failure(Exception):
    """The command could not do what it was asked; the message is for the user. Exit status 1."""


def missing_package(what: str, error: ModuleNotFoundError) -> Failure:
    """The failure that says what to install."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS:
        raise error
    return Failure(f"{what} needs {name}; run: {sys.executable} -m pip install 'dlkernels[{EXTRAS[name]}]'")


def wide_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=150)
