"""Loads the compiled extension, after checking that it was compiled for the torch that is running.

An extension compiled for another torch stops in the dynamic linker with an undefined symbol, or crashes later. The
build records what it was made for in `_build_info.py`; a difference is an ImportError that names the repairing
command.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent


def load() -> types.ModuleType:
    """Returns `dlkernels._C`.

    Raises:
        ImportError: it is missing, was compiled for another torch, or refuses the instruction set that was asked for.
        SystemExit: the same, where the `dlkernels` command is what imports: its errors are one line.
    """
    try:
        return _load()
    except ImportError as error:
        if _is_command():
            sys.exit(f"dlkernels: {error}")
        raise


def _is_command() -> bool:
    """Whether the process is `dlkernels ...` or `python -m dlkernels ...`, which import the package before they run."""
    program = Path(sys.argv[0]).stem if sys.argv else ""
    return program == "dlkernels" or (program == "-m" and "dlkernels" in sys.orig_argv)


def _load() -> types.ModuleType:
    try:
        from ._build_info import BUILD_INFO
    except ModuleNotFoundError as error:
        raise ImportError(_not_built()) from error
    if BUILD_INFO["torch"] != torch.__version__:
        raise ImportError(_wrong_torch(BUILD_INFO))
    try:
        return importlib.import_module("dlkernels._C")
    except ModuleNotFoundError as error:
        raise ImportError(_not_built()) from error
    except ImportError as error:
        if "undefined symbol" not in str(error):
            raise
        raise ImportError(_wrong_torch(BUILD_INFO)) from error


def _in_checkout() -> bool:
    return (PACKAGE.parent / "CMakeLists.txt").exists()


def _wrong_torch(build_info: dict) -> str:
    repair = (
        f"pip install --force-reinstall --no-deps {PACKAGE.parent}"
        if _in_checkout()
        else "pip install --force-reinstall --no-cache-dir --no-build-isolation dlkernels"
    )
    return (
        f"dlkernels {build_info['dlkernels']} was compiled for torch {build_info['torch']}, "
        f"you have {torch.__version__}; run: {repair}"
    )


def _not_built() -> str:
    repair = (
        f"make -C {PACKAGE.parent} dev (or start Python in another folder to import the installed dlkernels)"
        if _in_checkout()
        else "pip install --force-reinstall --no-deps dlkernels"
    )
    return f"the dlkernels in {PACKAGE} has no compiled extension for this Python; run: {repair}"
