"""Proves the CUDA kernels on the GPU of this machine: builds them, runs the tests on it, NVIDIA's checkers, benchmarks.

    make gpu                    everything, or what is left of it
    make gpu GPU_ARGS=--dry-run the same on a machine without one, on the host (``DLKERNELS_SIMT=1``)

Every stage that has passed is recorded in build/gpu, with the sources that it passed with: cut short and started again,
the run goes on where it stopped. What the benchmarks found so far is written after each column, to
benchmarks/results/<gpu>.md with its figures beside it (a dry run's, of the processor, to build/gpu). The last lines are
a summary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("cross_entropy", "batch_norm", "lstm", "attention", "conv2d", "linear", "linear_cross_entropy")
SOURCES = ("csrc", "dlkernels", "tests", "CMakeLists.txt", "setup.py")
# What torch.compile writes kernels of its own for; the others it passes on to the same libraries as torch.
FUSED_BY_COMPILERS = ("cross_entropy", "batch_norm")
# Some small cases of every column: a checker makes each of them a hundred times slower.
SMALL_CASES = (
    "test_values_and_gradients_match_torch and float32 and cuda "
    "and (unbatched or features or depthwise or one_layer or packed or float_mask)"
)


@dataclass
class Stage:
    """One step: a command, what to add to its environment, and why it may be left out."""

    name: str
    command: list[str]
    environment: dict[str, str]
    left_out: str = ""


def stages(dry_run: bool) -> Iterator[Stage]:
    """What has to pass, in order."""
    kernels = "simt" if dry_run else "cuda"
    yield Stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        {"DLKERNELS_SIMT" if dry_run else "DLKERNELS_CUDA": "1"},
    )
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "--continue-on-collection-errors", "tests"]
    workers = ["-n", str(min(os.cpu_count() or 1, 8))]
    yield Stage("tests", [*tests, *workers, "-k", kernels], {})
    checker = shutil.which("compute-sanitizer")
    reason = "no GPU" if dry_run else "" if checker else "compute-sanitizer is not on PATH"
    for tool in ("memcheck", "initcheck", "racecheck", "synccheck"):
        command = [checker or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests, "-k", SMALL_CASES]
        yield Stage(tool, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, reason)
    for column in COLUMNS:
        options = ["--quick"] if dry_run else ["--device", "cuda"]
        options += ["--providers", "compile"] if column in FUSED_BY_COMPILERS and not dry_run else []
        figures = str(RECORDS / f"{figures_prefix(dry_run)}{column}.json")
        command = [sys.executable, "-m", "dlkernels", "bench", column, *options, "--json", figures]
        yield Stage(f"bench {column}", command, {})


def figures_prefix(dry_run: bool) -> str:
    """What the files of a column's figures are called, so that those of a dry run are never those of a GPU."""
    return "dry-figures-" if dry_run else "figures-"


def write_report(dry_run: bool) -> str:
    """Writes one report of the columns measured so far; returns a line for the summary."""
    from dlkernels import bench  # only now: the build has just made it

    paths = [RECORDS / f"{figures_prefix(dry_run)}{column}.json" for column in COLUMNS]
    runs = [bench.read_json(path) for path in paths if path.exists()]
    if not runs:
        return "report                     left out: nothing was measured"
    run = bench.merged(runs)
    name = re.sub(r"[^a-z0-9]+", "-", run.environment.get("gpu", "dry-run").lower()).strip("-")
    report = (RECORDS if dry_run else RESULTS) / f"{name}.md"
    bench.write_report(run, report)
    bench.write_plot(run, report.with_suffix(".png"))
    wrong = f", {len(run.wrong)} results DIFFER from torch's" if run.wrong else ""
    return f"report                     {report.relative_to(ROOT)}: {len(runs)} of {len(COLUMNS)} columns{wrong}"


def digest_of_sources() -> str:
    """Changes with every source of the kernels and of their tests."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in {".cc", ".cpp", ".cu", ".cuh", ".h", ".py", ".txt"} and file.stem != "_build_info":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def run(stage: Stage, digest: str) -> str:
    """Runs a stage, unless it has passed already; returns a line for the summary."""
    if stage.left_out:
        return f"{stage.name:<26} left out: {stage.left_out}"
    file_name = stage.name.replace(" ", "-")
    record = RECORDS / f"{file_name}.json"
    if record.exists() and json.loads(record.read_text())["digest"] == digest:
        return f"{stage.name:<26} passed before"
    log = RECORDS / f"{file_name}.log"
    print(f"{stage.name}: {' '.join(stage.command)}", flush=True)
    begin = time.monotonic()
    with log.open("w") as output:
        finished = subprocess.run(
            stage.command, cwd=ROOT, env=os.environ | stage.environment, stdout=output, stderr=subprocess.STDOUT
        )
    seconds = time.monotonic() - begin
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
    if finished.returncode == 0:
        record.write_text(json.dumps({"digest": digest, "seconds": seconds, "last": last}))
    outcome = "passed" if finished.returncode == 0 else f"FAILED ({finished.returncode}), see {log.relative_to(ROOT)}"
    told = f": {last}" if "passed" in last or finished.returncode != 0 else ""
    return f"{stage.name:<26} {outcome} in {seconds:.0f} s{told}"


def main() -> int:
    """Runs all stages; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, on the host")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the summary is still printed
    RECORDS.mkdir(parents=True, exist_ok=True)
    digest = digest_of_sources() + ("-dry" if arguments.dry_run else "")
    summary: list[str] = []
    report = "report                     left out: nothing was measured"
    try:
        for stage in stages(arguments.dry_run):
            summary.append(run(stage, digest))
            if "FAILED" in summary[-1] and stage.name == "build":
                break
            if stage.name.startswith("bench"):
                report = write_report(arguments.dry_run)
    finally:
        summary.append(report)
        print("\n".join(["", "CUDA kernels on the host" if arguments.dry_run else "CUDA kernels on a GPU", *summary]))
    return 1 if any("FAILED" in line or "DIFFER" in line for line in summary) else 0


if __name__ == "__main__":
    sys.exit(main())
