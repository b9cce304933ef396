"""The simulator of CUDA's execution model finds what it is there to find."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of faults.cc."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels that are wrong")
    program = tmp_path_factory.mktemp("simt") / "faults"
    sources = [str(HERE / "faults.cc"), str(HERE / "simt.cc")]
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{HERE}", *sources, "-o", str(program)], check=True)
    return program


def outcome(program: Path, name: str) -> str:
    return subprocess.run([program, name], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", "32 threads ended while others wait at"),
        ("two_barriers", "threads wait at"),
        ("divergent_exchange", "a lane waits for its warp at"),
        ("block_that_waits_alone", "a grid whose blocks do not run together"),
        ("misaligned_copy", "no multiple of 16"),
        ("unknown_barrier", "a barrier is used that was not initialized"),
        ("phase_without_end", "a thread waits for a phase that nobody ends at"),
        ("copy_that_outlives_its_block", "a block ended while copies or products were under way"),
        ("misaligned_box", "a box at an address that is no multiple of 1024"),
        ("writes_outside", "wrote outside its 256 bytes of shared memory"),
    ],
)
def test_what_a_kernel_must_not_do_is_an_error(faults: Path, name: str, message: str) -> None:
    assert message in outcome(faults, name)


@pytest.mark.parametrize("name", ["neighbours", "rounds", "copies", "grid", "boxes"])
def test_a_missing_barrier_is_seen_under_some_schedule(faults: Path, name: str) -> None:
    assert outcome(faults, name) == "4"
    assert int(outcome(faults, f"{name}_without_barrier")) < 4
