"""Writes docs/networks.md: every network of dlkernels.models, its papers, what it reached, its size and its speed.

Parameters and multiply-adds are counted on the meta device. What was reached comes from docs/networks.json, a list of
runs ``{"network": "lenet", "command": "dlkernels train lenet", "metric": "test accuracy", "value": 0.98}``; speed-ups
come from benchmarks/results/models-*.json, written by benchmarks/bench_models.py.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dlkernels import models
from dlkernels.bench.harness import TORCH
from dlkernels.bench.models import INFERENCE, TRAINING, WORKLOADS
from dlkernels.bench.report import markdown_table
from dlkernels.commands.models import SIZES
from dlkernels.writing import write_text

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "networks.md"
RUNS = ROOT / "docs" / "networks.json"
SPEEDS = ROOT / "benchmarks" / "results"

# Height and width of the images that a network is for, where that is not an argument of it; 224 for all others.
IMAGE_SIZES = {
    "cellnetwork": 32,
    **{f"resnet{depth}": 32 for depth in (20, 32, 44, 56, 110)},
    **{f"efficientnet_b{index}": size for index, size in enumerate((224, 240, 260, 300, 380, 456, 528, 600))},
}

TITLE = """\
# Networks

Written by `python tools/networks.py`, a section for each file of `dlkernels/models` under the papers that it follows.
Parameters are counted, and multiply-adds of matrix products and convolutions for one image of the size given. Training
step and inference are the time of the same network on torch's layers over that on ours, in float32 / bfloat16, so that
above 1 is faster than torch; [Benchmarks](benchmarks.md) says on what machine. Cells of what was not
measured are empty.
"""
AUTHOR = r"[A-Z][\w'’-]+"
CITATION = re.compile(rf"{AUTHOR}(?:, {AUTHOR})*(?: & {AUTHOR}| et al\.)? (?:19|20)\d\d[a-z]?")


def takes(name: str) -> dict[str, Any]:
    """The parameters of the network's builder with their defaults, ``inspect.Parameter.empty`` where there is none."""
    found = inspect.signature(models.get_model_builder(name)).parameters.values()
    return {p.name: p.default for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD}


def arguments(name: str) -> dict[str, int]:
    """What the network has to be given.

    Raises:
        ValueError: something that :data:`SIZES` has not.
    """
    required = [key for key, default in takes(name).items() if default is inspect.Parameter.empty]
    unknown = [key for key in required if key not in SIZES]
    if unknown:
        raise ValueError(f"{name} has no default for {', '.join(unknown)}: give one in SIZES of commands/models.py")
    return {key: SIZES[key] for key in required}


def build(name: str) -> torch.nn.Module:
    """The network on torch's layers, in evaluation, without numbers."""
    with torch.device("meta"):
        return models.get_model(name, layers=torch.nn, **arguments(name)).eval()


def parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def example(name: str, model: torch.nn.Module) -> torch.Tensor | None:
    """An image for a classifier, ``[1, C, S, S]`` or ``[1, features]``; no other network has a usual input."""
    if hasattr(model, "loss") or hasattr(model, "generator_loss"):
        return None
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    if isinstance(layer, torch.nn.Linear):
        return torch.empty(1, layer.in_features, device="meta")
    sizes = {"image_size": 224, **takes(name), **arguments(name)}
    side = IMAGE_SIZES.get(name, sizes["image_size"])
    return torch.empty(1, layer.in_channels, side, side, device="meta")


def multiply_adds(model: torch.nn.Module, image: torch.Tensor) -> int:
    """Of the products and convolutions of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def sources(text: str | None) -> str:
    """The papers that a docstring cites."""
    return "; ".join(dict.fromkeys(CITATION.findall(" ".join((text or "").split()))))


def speed_ups(folder: Path) -> dict[tuple[str, str], list[str]]:
    """By registered network and direction: torch's time over ours in float32 / bfloat16, for each machine measured."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("models-*.json")):
        ratios: dict[tuple[str, str], dict[str, str]] = {}
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            if result["ratio"]:
                key = (result["network"], result["direction"])
                ratios.setdefault(key, {})[result["dtype"]] = f"{result['ratio'][TORCH]:.2f}"
        for (workload, direction), by_dtype in ratios.items():
            both = " / ".join(by_dtype.get(dtype, "") for dtype in ("float32", "bfloat16"))
            measured, machine = WORKLOADS[workload], path.stem.removeprefix("models-")
            found.setdefault((measured.network, direction), []).append(f"{measured.title}, {machine}: {both}")
    return found


def row(name: str, runs: list[dict[str, Any]], speeds: dict[tuple[str, str], list[str]]) -> list[str]:
    """One network."""
    model = build(name)
    image = example(name, model)
    size = "" if image is None else "x".join(map(str, image.shape[1:]))
    own = [run for run in runs if run["network"] == name]
    given = ", ".join(f"{key}={value}" for key, value in arguments(name).items())
    return [
        f"`{name}` {given}".strip(),
        f"{parameters(model):,}",
        size,
        "" if image is None else f"{multiply_adds(model, image):,}",
        "<br>".join(speeds.get((name, TRAINING), [])),
        "<br>".join(speeds.get((name, INFERENCE), [])),
        "<br>".join(f"{run['metric']} {run['value']:.4g}" for run in own),
        "<br>".join(f"`{run['command']}`" for run in own),
    ]


def section(family: str, runs: list[dict[str, Any]], speeds: dict[tuple[str, str], list[str]]) -> list[str]:
    """The lines of one file of dlkernels/models: its papers and its networks.

    Raises:
        ValueError: it cites no paper.
    """
    names = models.list_models(family)
    cited = sources(sys.modules[models.get_model_builder(names[0]).__module__].__doc__)
    if not cited:
        raise ValueError(f"the docstring of dlkernels/models/{family}.py cites no paper, as in 'He et al. 2016'")
    table = markdown_table(HEADINGS, [row(name, runs, speeds) for name in names])
    return ["", f"## {family}", "", f"{cited}.", "", *table]


HEADINGS = ["network", "parameters", "image", "multiply-adds", TRAINING, INFERENCE, "reached", "by"]


def document() -> str:
    """The text of docs/networks.md."""
    runs = json.loads(RUNS.read_text(encoding="utf-8"))
    speeds = speed_ups(SPEEDS)
    families = {models.get_model_builder(name).__module__.rpartition(".")[2] for name in models.list_models()}
    lines = [line for family in sorted(families) for line in section(family, runs, speeds)]
    return "\n".join([TITLE, *lines[1:]]) + "\n"


if __name__ == "__main__":
    write_text(DOCUMENT, document())
