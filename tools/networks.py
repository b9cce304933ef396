"""Writes docs/networks.md: every network of dlkernels.models, its size, where it is from, what it reached, how fast it is.

Parameters and multiply-adds are counted on the meta device. What was reached comes from docs/networks.json, a list of
runs ``{"network": "lenet", "command": "dlkernels train lenet", "metric": "test accuracy", "value": 0.98}``; speed-ups
come from benchmarks/results/models-*.json, written by benchmarks/bench_models.py. Cells of what was not measured are
empty.
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
from dlkernels.bench.models import INFERENCE, TRAINING, WORKLOADS
from dlkernels.bench.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "networks.md"
RUNS = ROOT / "docs" / "networks.json"
SPEEDS = ROOT / "benchmarks" / "results"

# Networks that some sizes must be given for: small ones, for images of 32 x 32 or a vocabulary of characters.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "visiontransformer": {
        "image_size": 32,
        "patch_size": 4,
        "num_layers": 6,
        "num_heads": 4,
        "hidden_dim": 128,
        "mlp_dim": 256,
    },
    "mlpmixer": {
        "image_size": 32,
        "patch_size": 4,
        "num_layers": 6,
        "hidden_dim": 128,
        "tokens_mlp_dim": 64,
        "channels_mlp_dim": 256,
    },
}
# Height and width of the images that a network is for, where that is not its argument ``image_size``; 224 otherwise.
IMAGE_SIZES = {"cellnetwork": 32}

TITLE = """\
# Networks

Written by `python tools/networks.py`. Parameters and multiply-adds (of matrix products and convolutions, for one image
of the size given) are counted; sources are the papers that a network follows. A training step and inference are the time
of the same network on torch's layers over that on ours, in float32 / bfloat16, so that above 1 is faster than torch:
[benchmarks/results](../benchmarks/results) has the machines.
"""
AUTHOR = r"[A-Z][\w'’-]+"
CITATION = re.compile(rf"{AUTHOR}(?:, {AUTHOR})*(?: & {AUTHOR}| et al\.)? (?:19|20)\d\d[a-z]?")


def arguments(name: str) -> str:
    """What :data:`ARGUMENTS` gives the network, as it would be written."""
    return ", ".join(f"{key}={value}" for key, value in ARGUMENTS.get(name, {}).items())


def build(name: str) -> torch.nn.Module:
    """The network on torch's layers, in evaluation, without numbers.

    Raises:
        ValueError: it has no size of its own and none in :data:`ARGUMENTS`.
    """
    try:
        with torch.device("meta"):
            return models.get_model(name, layers=torch.nn, **ARGUMENTS.get(name, {})).eval()
    except TypeError as error:
        raise ValueError(f"{name} cannot be built: add what it needs to ARGUMENTS in {Path(__file__).name}") from error


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
    size = inspect.signature(models.get_model_builder(name)).parameters.get("image_size")
    own = None if size is None or size.default is inspect.Parameter.empty else size.default
    side = ARGUMENTS.get(name, {}).get("image_size") or IMAGE_SIZES.get(name) or own or 224
    return torch.empty(1, layer.in_channels, side, side, device="meta")


def multiply_adds(model: torch.nn.Module, image: torch.Tensor) -> int:
    """Of the products and convolutions of one forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def source(name: str) -> str:
    """The papers that the builder cites, or else the class that it builds, or else their file."""
    builder = models.get_model_builder(name)
    network = builder if isinstance(builder, type) else type(build(name))
    for documented in (builder, network, sys.modules[builder.__module__]):
        cited = CITATION.findall(" ".join((documented.__doc__ or "").split()))
        if cited:
            return "; ".join(dict.fromkeys(cited))
    raise ValueError(f"neither {name} nor {builder.__module__} cites a paper in its docstring")


def speed_ups(folder: Path) -> dict[tuple[str, str], list[str]]:
    """By registered network and direction: torch's time over ours in float32 / bfloat16, for each machine measured."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(folder.glob("models-*.json")):
        ratios: dict[tuple[str, str], dict[str, str]] = {}
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            key = (WORKLOADS[result["network"]].network, result["direction"])
            if result["ratio"]:
                ratios.setdefault(key, {})[result["dtype"]] = f"{result['ratio']['torch']:.2f}"
        for key, by_dtype in ratios.items():
            both = " / ".join(by_dtype.get(dtype, "") for dtype in ("float32", "bfloat16"))
            found.setdefault(key, []).append(f"{path.stem.removeprefix('models-')} {both}")
    return found


def row(name: str, runs: list[dict[str, Any]], speeds: dict[tuple[str, str], list[str]]) -> list[str]:
    """One network."""
    model = build(name)
    image = example(name, model)
    size = "" if image is None else "x".join(map(str, image.shape[1:]))
    own = [run for run in runs if run["network"] == name]
    return [
        f"`{name}`" + (f" {arguments(name)}" if name in ARGUMENTS else ""),
        models.get_model_builder(name).__module__.rpartition(".")[2],
        source(name),
        "<br>".join(f"`{run['command']}`" for run in own),
        "<br>".join(f"{run['metric']} {run['value']:.4g}" for run in own),
        f"{parameters(model):,}",
        "" if image is None else f"{multiply_adds(model, image):,}",
        size,
        "<br>".join(speeds.get((name, TRAINING), [])),
        "<br>".join(speeds.get((name, INFERENCE), [])),
    ]


TEXTS = ["network", "family", "source", "command", "reached"]
FIGURES = ["parameters", "multiply-adds", "image", "training step", "inference"]


def document() -> str:
    """The text of docs/networks.md."""
    runs = json.loads(RUNS.read_text(encoding="utf-8"))
    speeds = speed_ups(SPEEDS)
    names = sorted(models.list_models(), key=lambda name: (models.get_model_builder(name).__module__, name))
    rows = [row(name, runs, speeds) for name in names]
    return "\n".join([TITLE, *markdown_table(TEXTS + FIGURES, rows, len(TEXTS))]) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
