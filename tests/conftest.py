"""Fixtures that every suite shares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from dlkernels import _C
from dlkernels.info import build_facts

from .cases import values_on

settings.register_profile("repeatable", max_examples=100, deadline=None, derandomize=True)
settings.load_profile("repeatable")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers on every run and in any order."""
    torch.manual_seed(0)


def has_simulator() -> bool:
    """Whether the build has the CUDA kernels on the host (``DLKERNELS_SIMT=1``)."""
    chosen = _C.isa()
    found = _C.select_isa("simt")
    _C.select_isa(chosen)
    return found


def run_on(kernels: str) -> Iterator[str]:
    if kernels == "cuda":
        with values_on("cuda"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield kernels
        return
    chosen = _C.isa()
    assert _C.select_isa(kernels)
    yield kernels
    _C.select_isa(chosen)


def device_kernels() -> list[str]:
    """CUDA's kernels, on the host and on a GPU, as far as both are here."""
    has_gpu = torch.cuda.is_available() and build_facts()["cuda"] is not None
    return [*(["simt"] if has_simulator() else []), *(["cuda"] if has_gpu else [])]


@pytest.fixture(params=[*_C.available_isas(), *device_kernels()])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the kernels of every instruction set that this machine has, on CUDA's on the host, and with
    values on a GPU."""
    yield from run_on(request.param)


@pytest.fixture(params=_C.available_isas())
def processor_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the kernels of every instruction set that this machine has."""
    yield from run_on(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every element type that the kernels support."""
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
