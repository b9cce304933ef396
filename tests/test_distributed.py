"""Two processes under torchrun compute what one does, and one of them speaks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dlkernels.models import registry
from dlkernels.train import checkpoint

from .cases import ranks
from .cases.training import BUILDERS

pytest.importorskip("safetensors")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*TORCHRUN, "tests.cases.ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_compute_what_one_process_does(
    case: str, two_ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, builder in BUILDERS.items():
        monkeypatch.setitem(registry._builders, name, builder)
    expected = ranks.found(ranks.prepared(**ranks.CASES[case]))
    first, second = (rank[case] for rank in two_ranks)
    assert first == second
    assert len(first["steps"]) == ranks.STEPS
    for (losses, validation), (expected_losses, expected_validation) in zip(
        first["steps"], expected["steps"], strict=True
    ):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert validation == pytest.approx(expected_validation, rel=1e-5)
    assert first["test"] == pytest.approx(expected["test"], rel=1e-5)
    for name, values in expected["weights"].items():
        assert first["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6)


def test_a_resumed_run_of_two_ranks_is_the_run_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["resumed"] for rank in two_ranks] == [True, True]


def test_nothing_that_is_parallel_outlives_its_processes(two_ranks: list[dict[str, Any]]) -> None:
    """Not even where a run ends with an error: the process may hang otherwise."""
    assert [rank["left over"] for rank in two_ranks] == [0, 0]


def test_the_command_runs_on_two_ranks_and_one_of_them_speaks(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log.jsonl"
    command = ["train", "tinyclassifier", "--data", "synthetic", "--image-size", "4", "--batch-size", "60"]
    options = ["--save", str(folder), "--log-file", str(log), "--save-every", "7"]
    process = subprocess.Popen(
        [*TORCHRUN, "tests.cases.training", *command, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not log.exists() or log.read_bytes().count(b"\n") < 40:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=300)
    assert process.returncode != 0
    assert out.count("tinyclassifier on synthetic: 1800 examples to train") == 1
    assert "seed 0, 2 processes\n" in out
    assert out.count("epoch   1/20") == 1
    said = [line for line in error.splitlines() if "dlkernels: " in line]
    assert len(said) == 1
    assert "interrupted at epoch" in said[0]
    assert said[0].endswith(f"go on with: torchrun --nproc-per-node 2 -m dlkernels train --resume {folder}")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    _, facts = checkpoint.read(folder / checkpoint.LAST)
    assert facts["state"]["step"] == len(steps)
    assert len(facts["state"]["generators"]) == 2
