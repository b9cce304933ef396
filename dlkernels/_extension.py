"""Loads the compiled extension, after checking that it was compiled for the torch, CUDA and Python that are running.

An extension compiled for another torch or CUDA stops in the dynamic linker with an undefined symbol, or crashes later;
one for another Python is not found. The build records what it was made for in `_build_info.py`; a difference is an
ImportError that names both versions and the repairing command.
"""

from __future__ import annotations

import importlib
import platform
import sys
import types
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent


def load() -> types.ModuleType:
    """Returns `dlkernels._C`.

    Raises:
        ImportError: it is missing, was compiled for another torch, CUDA or Python, or refuses the instruction set that
            was asked for.
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
    cuda = BUILD_INFO.get("cuda")
    if cuda and torch.version.cuda and _major(cuda) != _major(torch.version.cuda):
        raise ImportError(_compiled_for(BUILD_INFO, f"CUDA {cuda}", f"your torch is for CUDA {torch.version.cuda}"))
    try:
        return importlib.import_module("dlkernels._C")
    except ModuleNotFoundError as error:
        python = BUILD_INFO.get("python", "")
        if python and python.split(".")[:2] != platform.python_version().split(".")[:2]:
            other = _compiled_for(BUILD_INFO, f"Python {python}", f"you have {platform.python_version()}")
            raise ImportError(other) from error
        raise ImportError(_not_built()) from error
    except ImportError as error:
        if "undefined symbol" not in str(error):
            raise
        raise ImportError(_wrong_torch(BUILD_INFO)) from error


def _in_checkout() -> bool:
    return (PACKAGE.parent / "CMakeLists.txt").exists()


def _major(version: str) -> str:
    return version.partition(".")[0]


def _wrong_torch(build_info: dict[str, Any]) -> str:
    return _compiled_for(build_info, f"torch {build_info['torch']}", f"you have {torch.__version__}")


def _compiled_for(build_info: dict[str, Any], what: str, instead: str) -> str:
    """The message that names what the build was made for, what is there instead, and how to build it again."""
    repair = (
        f"pip install --force-reinstall --no-deps {PACKAGE.parent}"
        if _in_checkout()
        else "pip install --force-reinstall --no-cache-dir --no-build-isolation dlkernels"
    )
    with_cuda = "DLKERNELS_CUDA=1 " if build_info.get("cuda") else ""
    return f"dlkernels {build_info['dlkernels']} was compiled for {what}, {instead}; run: {with_cuda}{repair}"


def _not_built() -> str:
    repair = (
        f"make -C {PACKAGE.parent} dev (or start Python in another folder to import the installed dlkernels)"
        if _in_checkout()
        else "pip install --force-reinstall --no-deps dlkernels"
    )
    return f"the dlkernels in {PACKAGE} has no compiled extension for this Python; run: {repair}"
