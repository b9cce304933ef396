"""docs/networks.md shows what the code has."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

from dlkernels import models

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def networks() -> Any:
    location = importlib.util.spec_from_file_location("networks_script", ROOT / "tools" / "networks.py")
    assert location is not None and location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    return module


def test_the_document_has_every_network_with_its_parameters(networks: Any) -> None:
    text = networks.DOCUMENT.read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([\d,]+) \|", text, re.MULTILINE))
    counted = {name: f"{networks.parameters(networks.build(name)):,}" for name in models.list_models()}
    assert written == counted, "run python tools/networks.py"


def test_a_section_is_what_the_command_writes(networks: Any) -> None:
    runs = json.loads(networks.RUNS.read_text(encoding="utf-8"))
    section = networks.section("lenet", runs, networks.speed_ups(networks.SPEEDS))
    assert "\n".join(section) in networks.DOCUMENT.read_text(encoding="utf-8")


def test_runs_and_speeds_fill_their_cells(networks: Any, tmp_path: Path) -> None:
    results = [
        {"network": "lenet", "direction": "training step", "dtype": dtype, "ratio": ratio}
        for dtype, ratio in (("float32", {"torch": 1.5}), ("bfloat16", {"torch": 2.0}))
    ]
    results.append({"network": "lenet", "direction": "inference", "dtype": "float32", "ratio": {}})
    (tmp_path / "models-cpu.json").write_text(json.dumps({"results": results}))
    runs = [{"network": "lenet", "command": "dlkernels train lenet", "metric": "test accuracy", "value": 0.98612}]
    row = networks.row("lenet", runs, networks.speed_ups(tmp_path))
    assert row == [
        "`lenet`",
        "212,590",
        "1x28x28",
        "3,021,480",
        "LeNet, cpu: 1.50 / 2.00",
        "",
        "test accuracy 0.9861",
        "`dlkernels train lenet`",
    ]


@pytest.mark.parametrize(
    ("text", "papers"),
    [
        ("Residual networks (He et al.\n2016a), and others.", "He et al. 2016a"),
        ("Fisher & Yates 1938; Hochreiter & Schmidhuber 1997", "Fisher & Yates 1938; Hochreiter & Schmidhuber 1997"),
        ("by Sutskever, Vinyals & Le 2014, and by Le 2014.", "Sutskever, Vinyals & Le 2014; Le 2014"),
        ("Adds 224 pixels to 1998 others", ""),
        (None, ""),
    ],
)
def test_papers_are_found_in_docstrings(networks: Any, text: str | None, papers: str) -> None:
    assert networks.sources(text) == papers


def test_a_network_without_a_known_size_is_named(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizeless(depth: int) -> torch.nn.Module:
        return torch.nn.Identity()

    monkeypatch.setitem(models.registry._builders, "sizeless", sizeless)
    with pytest.raises(ValueError, match="sizeless has no default for depth: give one in SIZES of commands/models.py"):
        networks.build("sizeless")


def test_multiply_adds_are_those_of_the_formula(networks: Any) -> None:
    layer = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2, device="meta")
    assert networks.multiply_adds(layer, torch.empty(1, 4, 8, 8, device="meta")) == 6 * 64 * 9 * 2
