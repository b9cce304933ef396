"""Writes docs/support.md: what the shared suites of the tests have shown, counted from their outcomes.

``python tools/support_matrix.py`` runs those suites, some minutes; ``--check`` only collects them and compares the
number of tests in each cell with what the document says, for the instruction sets that this machine has.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "support.md"
OPERATIONS = ("conv2d", "batch_norm", "lstm", "linear", "cross_entropy", "linear_cross_entropy", "attention")

KERNELS = "test_values_and_gradients_match_torch"  # for every element type and instruction set
TRANSFORMS = "test_transforms_of_functions_give_what_torch_gives"
WRAPPERS = {  # row of the second table: the tests of tests/test_composition.py that fill it
    "compile": ("test_compiles_whole_and_trains_the_same", "test_compiles_whole_for_inference"),
    "export": ("test_exports",),
    "make_fx": ("test_traces_with_make_fx",),
    "meta": ("test_meta_tensors_give_shapes_types_and_strides",),
    "checkpoint": ("test_recomputes_under_activation_checkpointing",),
    "compiled autograd": ("test_runs_under_compiled_autograd",),
    "double backward": ("test_second_gradients_are_those_of_torch",),
    "torch.func": (TRANSFORMS,),
    "vmap": (),  # the transform of torch.func that is one
    "autocast": ("test_autocast_gives_the_type_that_torch_gives",),
    "opcheck": ("test_operators_pass_opcheck",),
}
WRAPPER_OF_TEST = {test: wrapper for wrapper, tests in WRAPPERS.items() for test in tests}

TITLE = """\
# Support matrix

Written by `python tools/support_matrix.py` from the outcomes of the tests that it runs; a cell is the number of tests
that passed, "1 of 2" where some did not, and a dash where there is none.

"""
KERNELS_TEXT = """\
## Element types and instruction sets

One test is one way of calling the operation, forward and backward, compared with torch in the same type and with torch
in float64 (`tests/test_accuracy.py`). Columns are the instruction sets of the machine that ran the tests; `simt`
is the CUDA kernels, run on the processor, and names that end in `_emulated` are kernels of a wider processor, their
instructions in software. A processor with AMX adds `amx`, a GPU `cuda`.

"""
WRAPPERS_TEXT = """\
## What torch wraps around an operation

`tests/test_composition.py`, on the instruction set that the processor is used with.

- **compile**: `torch.compile(fullgraph=True)`, static and dynamic, forward and backward, and inference by inductor.
- **export**: `torch.export`, strict and not.
- **double backward**: gradients of gradients equal torch's in float64.
- **torch.func**: `grad`, `jvp` and `hessian` equal torch's; torch's own operators compute inside.
- **vmap**: gradients of each example, `vmap` of `grad`; as above.
- **opcheck**: `torch.library.opcheck` of each operator, backward operators too.

"""

Cell = tuple[str, str]  # row and column of a table


class Recorder:
    """A plugin of pytest that counts tests, and those that passed, by cell."""

    def __init__(self) -> None:
        self.collected: Counter[Cell] = Counter()
        self.passed: Counter[Cell] = Counter()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if cell(item) is not None]
        self.collected.update(cell(item) for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any) -> Generator[None, Any, Any]:
        report = yield
        if report.when == "call" and report.passed:
            self.passed[cell(item)] += 1
        return report


def cell(item: Any) -> Cell | None:
    """Where a test is counted; None for those that are in no table."""
    test = item.originalname
    if test != KERNELS and test not in WRAPPER_OF_TEST:
        return None
    parameters = item.callspec.params
    if test == KERNELS:
        return f"{parameters['case'].column}, {str(parameters['dtype']).removeprefix('torch.')}", parameters["isa"]
    if parameters.get("transform") == "gradients of each example":
        return "vmap", parameters["case"].column
    if "case" in parameters:
        return WRAPPER_OF_TEST[test], parameters["case"].column
    operation = max((name for name in OPERATIONS if parameters["name"].startswith(name)), key=len, default="batch_norm")
    return WRAPPER_OF_TEST[test], operation


def run(*options: str) -> Recorder:
    """Collects the suites and, unless told otherwise, runs them."""
    recorder = Recorder()
    suites = [str(ROOT / "tests" / name) for name in ("test_accuracy.py", "test_composition.py")]
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *suites], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {status!r}")
    return recorder


def table(recorder: Recorder, corner: str, rows: list[str], columns: list[str]) -> str:
    """A table in Markdown."""

    def text(where: Cell) -> str:
        passed, collected = recorder.passed[where], recorder.collected[where]
        return "–" if not collected else str(passed) if passed == collected else f"{passed} of {collected}"

    lines = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[row, *(text((row, column)) for column in columns)] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def document(recorder: Recorder) -> str:
    """The whole page."""
    isas = list(dict.fromkeys(column for _, column in recorder.collected if column not in OPERATIONS))
    types = [f"{name}, {dtype}" for name in OPERATIONS for dtype in ("float32", "float64", "bfloat16", "float16")]
    return (
        TITLE
        + KERNELS_TEXT
        + table(recorder, "operation", types, isas)
        + "\n"
        + WRAPPERS_TEXT
        + table(recorder, "", list(WRAPPERS), list(OPERATIONS))
    )


def written(text: str) -> dict[Cell, int]:
    """The number of tests in each cell of a page that :func:`document` made."""
    counts: dict[Cell, int] = {}
    columns: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = []
            continue
        row, *cells = [entry.strip() for entry in line.strip("|").split("|")]
        columns = columns or cells  # a table begins with its heading
        for column, entry in zip(columns, cells, strict=True):
            if entry[-1].isdigit() and cells != columns:
                counts[row, column] = int(entry.split()[-1])
    return counts


def differences(recorder: Recorder, text: str) -> list[str]:
    """Cells whose number of tests is not the one in the page, of those that this machine can collect."""
    counts = written(text)
    here = {column for _, column in recorder.collected}
    cells = sorted(recorder.collected.keys() | {key for key in counts if key[1] in here})
    due = {column for _, column in counts} | {*OPERATIONS, "baseline"}
    return [
        f"{row}, {column}: {counts.get((row, column), 0)} in the page, {recorder.collected[row, column]} collected"
        for row, column in cells
        if column in due and counts.get((row, column), 0) != recorder.collected[row, column]
    ]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] == ["--check"]:
        wrong = differences(run("--collect-only", "-qq"), DOCUMENT.read_text(encoding="utf-8"))
        if wrong:
            raise SystemExit("\n".join([*wrong, "run python tools/support_matrix.py"]))
    else:
        DOCUMENT.write_text(document(run()), encoding="utf-8")


if __name__ == "__main__":
    main()
