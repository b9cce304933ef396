"""Fixtures that the reports share."""

from __future__ import annotations

import pytest
import torch

from dlkernels import data
from dlkernels.models import registry

from ..cases.training import BUILDERS, load_once


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """The networks of ``cases/training.py`` can be named; runs share their data."""
    commands = pytest.importorskip("dlkernels.commands.train", reason="the command line needs typer and rich")
    monkeypatch.setattr(data, "load", load_once)
    monkeypatch.setattr(commands.train, "operation_times", lambda program: [])  # of no interest, and slow
    torch.set_num_threads(1)
    for name, builder in BUILDERS.items():
        monkeypatch.setitem(registry._builders, name, builder)
