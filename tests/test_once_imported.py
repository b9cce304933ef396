"""torch.compile's part of torch is not imported with dlkernels, and finds dlkernels' functions when it is."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dlkernels.ops.once_imported import once_imported

COMPILES = """
import torch
from dlkernels import functional as F
layer = torch.compile(lambda x, w: F.linear(x, w).sum(), fullgraph=True, backend="aot_eager")
x, w = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
layer(x, w).backward()
assert torch.equal(x.grad, torch.full((2, 3), 4.0))
"""


# torch's submodules that its compiler imports would be missed only where nothing has imported that before.
ATTRIBUTES = """
import ast, functools, pathlib, sys
import dlkernels, torch
for path in pathlib.Path(dlkernels.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if names and isinstance(node, ast.Name) and node.id == "torch":
            functools.reduce(getattr, reversed(names), torch)
assert "torch._dynamo" not in sys.modules
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_dlkernels_does_not_import_dynamo() -> None:
    run("import sys, dlkernels, dlkernels.models, dlkernels.train; assert 'torch._dynamo' not in sys.modules")


def test_what_the_package_uses_of_torch_is_there_without_dynamo() -> None:
    run(ATTRIBUTES)


@pytest.mark.parametrize("before", ["", "import torch._dynamo\n"], ids=["after dlkernels", "before dlkernels"])
def test_functions_are_traced_whenever_dynamo_is_imported(before: str) -> None:
    run(before + COMPILES)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that can be imported as ``late_module``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "late_module", raising=False)
    path = tmp_path / "late_module.py"
    path.write_text("value = 1\n")
    return path


@pytest.mark.usefixtures("module")
def test_actions_run_once_after_the_module_in_their_order() -> None:
    finders, seen = list(sys.meta_path), []
    for number in range(2):
        once_imported("late_module", lambda number=number: seen.append((number, sys.modules["late_module"].value)))
    assert seen == []
    importlib.import_module("late_module")
    importlib.import_module("late_module")
    assert seen == [(0, 1), (1, 1)]
    assert sys.meta_path == finders
    once_imported("late_module", lambda: seen.append((2, 1)))
    assert seen[-1] == (2, 1)


def test_a_module_that_fails_is_waited_for_again(module: Path) -> None:
    finders, seen = list(sys.meta_path), []
    once_imported("late_module", lambda: seen.append(1))
    module.write_text("raise RuntimeError('broken')\n")
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module("late_module")
    assert seen == []
    module.write_text("repaired = True\n")
    importlib.invalidate_caches()
    importlib.import_module("late_module")
    assert seen == [1]
    assert sys.meta_path == finders


def test_a_module_that_is_not_there_stays_missing() -> None:
    finders = list(sys.meta_path)
    once_imported("no_such_module_anywhere", lambda: None)
    try:
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            importlib.import_module("no_such_module_anywhere")
    finally:
        sys.meta_path[:] = finders
