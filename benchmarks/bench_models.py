"""Measures whole networks, training steps and inference, against the same on torch's layers, eager and compiled.

A run of everything writes results/models-cpu.md, or models-cpu-amx.md where the processor has AMX, with the figures in
a JSON file beside it; a run of less is shown and not written. The networks are in dlkernels/bench/models.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from dlkernels.bench import models

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = ("float32", "bfloat16")


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 where a result is further from float64 than torch's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples, and not against torch.compile")
    parser.add_argument("--model", choices=models.WORKLOADS, action="append", help="only this one; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, help="only this element type")
    options = parser.parse_args(arguments)
    dtypes = [options.dtype] if options.dtype else DTYPES
    run = models.run(options.model or list(models.WORKLOADS), dtypes, quick=options.quick, console=Console(stderr=True))
    if options.quick or options.model or options.dtype:
        print(models.report(run), end="")
    else:
        kind = "cpu-amx" if run.environment["isa"] == "amx" else "cpu"
        path = RESULTS / f"models-{kind}.md"
        models.write_report(run, path)
        print(f"written to {path} and {path.with_suffix('.json').name}")
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
