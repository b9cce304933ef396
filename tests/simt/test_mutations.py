"""Everything that CUDA kernels wait for is needed: without it the simulator gives another result or stops."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
# Whole lines: barriers of a block, and what kernels on Hopper wait for, which is not a block.
BARRIER = re.compile(
    r"^\s*(__syncthreads\(\);|__syncwarp\(\);|ring\.\w+\[turn\.stage\]\.wait\(.*\);|wait_for_products<\d>\(\);)"
)


# Columns whose calls meet the barriers of what columns share; a column's own files begin with its name.
SHARED = {
    "reduce.cuh": "cross_entropy",
    "product.cuh": "linear",
    "hopper_product.cuh": "linear",
    "lay_out.cuh": "lstm",
    "column_sums.cuh": "linear",
}
COLUMNS = ("attention", "batch_norm", "conv2d", "cross_entropy", "linear", "lstm")


def column_of(file: Path) -> str:
    return SHARED.get(file.name) or next(column for column in COLUMNS if file.name.startswith(column))


def barriers() -> list[tuple[Path, int]]:
    """(file, line) of every barrier that is compiled for the host."""
    files = sorted([*CSRC.glob("cuda/*.cuh"), *CSRC.glob("cuda/*.cu")])
    return [
        (file, number)
        for file in files
        if file.name != "device.cuh"  # those are a grid's barrier on a device, which the host has its own of
        for number, line in enumerate(file.read_text().splitlines())
        if BARRIER.match(line)
    ]


def run_kernels(column: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Compiles a column's kernels, files in ``folder`` before those of the project, and calls them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the changed kernels")
    names = sorted(file.name for file in CSRC.glob(f"cuda/{column}*.cu") if file.stem != "linear_cross_entropy")
    changed = folder / "cuda"
    kernels = [changed / name if (changed / name).exists() else CSRC / "cuda" / name for name in names]
    program = folder / "drive"
    flags = ["-std=c++20", "-O1", "-Wno-unknown-pragmas", "-DDLKERNELS_ISA=simt", "-DDLKERNELS_SIMT"]
    includes = [f"-I{folder}", f"-I{CSRC}", f"-I{HERE}"]
    sources = [
        HERE / "drive.cc",
        HERE / "simt.cc",
        CSRC / "cuda" / "place.cpp",
        CSRC / "cpu" / "sizes.cpp",
        "-x",
        "c++",
        *kernels,
    ]
    subprocess.run([compiler, *flags, f"-DDRIVE_{column}", *includes, *sources, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("column", COLUMNS)
def test_kernels_as_they_are_agree_under_every_schedule(tmp_path: Path, column: str) -> None:
    finished = run_kernels(column, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(("file", "line"), barriers(), ids=lambda value: getattr(value, "name", str(value)))
def test_a_kernel_without_one_barrier_fails(tmp_path: Path, file: Path, line: int) -> None:
    lines = file.read_text().splitlines()
    lines[line] = BARRIER.sub("", lines[line])
    changed = tmp_path / "cuda" / file.name
    changed.parent.mkdir()
    changed.write_text("\n".join(lines) + "\n")
    finished = run_kernels(column_of(file), tmp_path)
    assert finished.returncode != 0
