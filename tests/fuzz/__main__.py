"""The command line of the fuzzer: a worker process for each instruction set, started again after a crash."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

CRASH_TEXT = 1500  # characters of a crashed worker's messages that are shown


def parse() -> argparse.Namespace:
    """What ``python -m tests.fuzz`` takes."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="time for all instruction sets together")
    parser.add_argument("--seed", type=int, help="the first seed; drawn from the clock without it")
    parser.add_argument("--count", type=int, help="cases, instead of a time")
    parser.add_argument("--only", default="", help="operations, separated by commas")
    parser.add_argument("--isa", default="", help="instruction sets, separated by commas; all of the build without it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the file that a worker writes its progress to
    return parser.parse_args()


def instruction_sets() -> list[str]:
    """All that this machine can run, CUDA's kernels on the host (``simt``) too."""
    from dlkernels import _C

    usable = list(_C.available_isas())
    return [*usable, "simt"] if _C.select_isa("simt") else usable


def work(options: argparse.Namespace) -> None:
    """Runs cases and prints a line of JSON for each finding. The progress file names the case that is running."""
    faulthandler.enable()
    warnings.filterwarnings("ignore")
    import torch

    from .calls import CALLS
    from .checks import cases, check

    torch.set_num_threads(1)
    operations = options.only.split(",") if options.only else list(CALLS)
    # The kernels of a device sum over pixels in the order in which lanes read them.
    ordered_by_layout = ("conv2d", "batch_norm") if options.isa == "simt" else ()
    rounds_factors = options.isa == "simt" or "bf16" in options.isa or "amx" in options.isa
    end = time.monotonic() + options.seconds
    progress = Path(options.worker)
    for done, (operation, seed) in enumerate(cases(operations, options.seed)):
        if done == options.count or (options.count is None and time.monotonic() > end):
            break
        progress.write_text(json.dumps([operation, seed, done]))
        case = check(operation, seed, operation not in ordered_by_layout, rounds_factors)
        for finding in case.findings:
            facts = {
                "operation": operation,
                "seed": seed,
                "kind": finding.kind,
                "text": finding.text,
                "dtype": str(case.dtype),
            }
            facts |= {"shapes": [tuple(t.shape) for t in case.tensors], "strides": [t.stride() for t in case.tensors]}
            print(json.dumps(facts | {"arguments": case.call.arguments}, default=str), flush=True)
    progress.write_text(json.dumps([None, None, done]))


def fuzz(isa: str, seed: int, seconds: float, options: argparse.Namespace) -> tuple[int, int]:
    """Fuzzes one instruction set; returns how many cases ran and how many findings were printed."""
    end, total, findings = time.monotonic() + seconds, 0, 0
    environment = dict(os.environ, DLKERNELS_ISA=isa)
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress.json"
        while True:
            command = [sys.executable, "-m", "tests.fuzz", "--worker", str(progress), "--seed", str(seed), "--isa", isa]
            command += ["--seconds", str(end - time.monotonic()), "--only", options.only]
            if options.count is not None:
                command += ["--count", str(options.count - total)]
            worker = subprocess.run(command, env=environment, capture_output=True, text=True)
            for line in worker.stdout.splitlines():
                findings += 1
                facts = json.loads(line)
                print(f"{isa} {facts['operation']}: {facts.pop('kind')}: {facts.pop('text')}\n  {facts}")
                print(f"  {repeat(isa, facts['seed'], options)}", flush=True)
            operation, at, done = json.loads(progress.read_text()) if progress.exists() else (None, None, 0)
            total += done
            if worker.returncode == 0:
                return total, findings
            if operation is None:  # it did not begin
                raise SystemExit(worker.stderr)
            findings += 1
            where = worker.stderr.partition("\nExtension modules:")[0]
            sanitizer = re.search(r".*(Sanitizer|runtime error):", where)  # such a report says what, then where
            where = where[sanitizer.start() :][:CRASH_TEXT] if sanitizer else where[-CRASH_TEXT:]
            print(f"{isa} {operation}: ended with status {worker.returncode}\n{where}")
            print(f"  {repeat(isa, at, options)}", flush=True)
            seed, total = at + 1, total + 1
            if (total >= options.count) if options.count is not None else (time.monotonic() > end):
                return total, findings


def repeat(isa: str, seed: int, options: argparse.Namespace) -> str:
    """The command that runs one case again."""
    only = f" --only {options.only}" if options.only else ""
    return f"python -m tests.fuzz --isa {isa} --seed {seed} --count 1{only}"


def main() -> None:
    """Prints findings as they come and a line of counts for each instruction set; exits with 1 if there was any."""
    options = parse()
    if options.worker:
        return work(options)
    isas = options.isa.split(",") if options.isa else instruction_sets()
    seed = options.seed if options.seed is not None else time.time_ns() // 1_000_000 % 10**9
    findings = 0
    for isa in isas:
        cases, found = fuzz(isa, seed, options.seconds / len(isas), options)
        print(f"{isa}: {cases} cases from seed {seed}, {found} findings", flush=True)
        findings += found
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
