"""DTensors: what two processes compute of tensors that they share is what one computes, with no more communication than
the cut asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from ..cases import sharded

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
FUNCTIONS = {f"{name} {cut}": (name, cut) for name, entry in sharded.FUNCTIONS.items() for cut in entry[3]}
PARALLELISED = [f"parallelised, converted {when}" for when in ("before", "after", "override")]

# Losses are torch's, which knows of loss_parallel.
OURS = ("linear", "conv2d", "batch_norm", "attention", "lstm")
# Cuts for which every rank works on its own part and nothing is sent, forward.
SILENT = {
    "linear": ([0, None, None], [1, None, None], [None, 0, 0], [2, 1, None]),
    "linear without bias": ([0, None], [None, 0], [1, 1]),
    "conv2d": ([0, None, None], [None, 0, 0], [1, 1, None]),
    "batch_norm": ([0, *[None] * 4], [1, *[0] * 4]),
    "batch_norm, training": ([1, *[0] * 4],),
    "attention": ([0] * 3, [1] * 3),
    "attention with a mask": ([0] * 4, [1, 1, 1, None]),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*TORCHRUN, "tests.cases.sharded", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_of_shared_tensors_give_torchs_values(case: str, two_ranks: list[dict[str, Any]]) -> None:
    name, cut = FUNCTIONS[case]
    for rank in two_ranks:
        assert "error" not in rank[case]
        assert rank[case]["ours"] == (name.replace(",", " ").split()[0] in OURS)
        if cut in SILENT.get(name, ()):
            assert rank[case]["collectives"] == 0


@pytest.mark.parametrize("case", [*PARALLELISED, "mixed", "half types"])
def test_models_and_calls_of_shared_tensors(case: str, two_ranks: list[dict[str, Any]]) -> None:
    assert [rank[case] for rank in two_ranks] == [{}, {}]
