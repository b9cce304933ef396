"""Two processes under torchrun compute the losses, gradients, queues and centres of one on the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .cases import ssl_ranks

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent


Found = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have written what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*torchrun, "-m", "tests.cases.ssl_ranks", str(folder))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Found:
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ssl_ranks.CASES)
def test_two_ranks_compute_what_one_process_does(case: str, two_ranks: Found) -> None:
    expected = ssl_ranks.found(case)
    for rank in two_ranks:
        assert rank[case].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                rank[case][name], tensor, rtol=1e-9, atol=1e-11, msg=lambda message, name=name: f"{name}: {message}"
            )


def test_keys_are_computed_of_rows_of_all_ranks_and_return_to_their_own(
    two_ranks: Found,
) -> None:
    shuffled = [rank["shuffled"] for rank in two_ranks]
    seen = torch.cat([rank["seen"] for rank in shuffled])
    assert torch.equal(seen.sort().values, torch.arange(8.0))
    for rank in shuffled:
        assert set(rank["seen"].tolist()) != set(rank["rows"].tolist())
        assert torch.equal(rank["doubled"], 2 * rank["rows"])


def test_unequal_shares_are_refused_by_every_rank(folder: Path) -> None:
    for rank in range(2):
        assert (folder / f"{rank}.txt").read_text() == "every process must bring equally many rows, got [3, 4]"
