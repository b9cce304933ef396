"""Measures models that others wrote, as they are, under ``dlkernels.override()`` and after ``dlkernels.convert()``.

ResNet-50 of torchvision, ViT-S/16 of timm, BERT base and GPT-2 of transformers, all with random weights and float32:
a training step (loss, backward, SGD with momentum) and inference. Before anything is timed, the losses and the logits
of both ways in are held against those of the model as it is. Writes results/dropin-cpu.md, or dropin-cpu-amx.md where
the processor has AMX, with the figures in a JSON file beside it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import dlkernels
from dlkernels import info
from dlkernels.bench.harness import OURS, PROCESSOR, SAME, TORCH, Budget, Program, Times, relative_difference, stopwatch
from dlkernels.bench.models import INFERENCE, TRAINING, step_program
from dlkernels.bench.report import circumstances, markdown_table
from dlkernels.writing import write_text

RESULTS = Path(__file__).resolve().parent / "results"
OVERRIDE = "override"


@dataclass(frozen=True)
class Foreign:
    """A model that another library builds, and the batch it is measured with."""

    title: str
    build: Callable[[], torch.nn.Module]
    inputs: tuple[Tensor, ...]
    labels: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of classes, or of the next token of each position."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def logits_of(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Of a library that returns them, or an object that has them."""
    output = model(*inputs)
    return output if isinstance(output, Tensor) else output.logits


def bert() -> torch.nn.Module:
    """BERT base with a head of two classes."""
    transformers = importlib.import_module("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig())


def gpt2() -> torch.nn.Module:
    """GPT-2 small."""
    transformers = importlib.import_module("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))


def foreign_models() -> list[Foreign]:
    """The models, each with a batch of random examples."""
    sys.path.insert(0, str(RESULTS.parent.parent))
    torchvision = importlib.import_module("tests.cases.reference").import_torchvision()
    timm = importlib.import_module("timm")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 224, 224, generator=generator)
    classes = torch.randint(1000, (8,), generator=generator)
    tokens = torch.randint(30_000, (4, 129), generator=generator)
    return [
        Foreign("torchvision ResNet-50", torchvision.models.resnet50, (images[:4],), classes[:4]),
        Foreign("timm ViT-S/16", lambda: timm.create_model("vit_small_patch16_224"), (images,), classes),
        Foreign("transformers BERT base", bert, (tokens[:, :128],), classes[:4] % 2),
        Foreign("transformers GPT-2", gpt2, (tokens[:, :128],), tokens[:, 1:]),
    ]


def quiet(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` without dropout, which each library draws for itself."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def inference(model: torch.nn.Module, foreign: Foreign) -> Program:
    """Logits of a batch."""
    model.eval()

    def program() -> Tensor:
        with torch.no_grad():
            return logits_of(model, foreign.inputs)

    return program


def training_step(model: torch.nn.Module, foreign: Foreign) -> Program:
    """One step on a batch."""

    def loss(*batch: Tensor) -> Tensor:
        return cross_entropy(logits_of(model, batch[:-1]), batch[-1])

    return step_program(loss, model, (*foreign.inputs, foreign.labels), torch.float32)


def overridden(program: Program) -> Program:
    """``program`` inside :func:`dlkernels.override`."""
    return dlkernels.override()(program)


@dataclass(kw_only=True)
class DropinResult(Times):
    """One model in training or in inference."""

    title: str
    direction: str
    difference: float  # relative, of the logits or the loss from those of the model as it is; the larger of both ways


def measure(foreign: Foreign, budget: Budget) -> list[DropinResult]:
    """One model in both directions.

    Raises:
        RuntimeError: a result differs from that of the model as it is.
    """
    torch.manual_seed(0)
    original = quiet(foreign.build())
    results = []
    for direction, make in ((INFERENCE, inference), (TRAINING, training_step)):
        programs = {
            TORCH: make(copy.deepcopy(original), foreign),
            OVERRIDE: overridden(make(copy.deepcopy(original), foreign)),
            OURS: make(dlkernels.convert(copy.deepcopy(original)), foreign),
        }
        answers = {name: program() for name, program in programs.items()}
        difference = max(relative_difference(answers[name], answers[TORCH]) for name in (OVERRIDE, OURS))  # type: ignore[arg-type]
        if not difference <= SAME[torch.float32]:
            raise RuntimeError(f"{foreign.title}, {direction}: differs by {difference:.1e}")
        result = DropinResult(title=foreign.title, direction=direction, difference=difference)
        result.take(programs, budget, stopwatch(PROCESSOR))
        results.append(result)
    return results


EXPLANATION = """\
Time of the model as it is over that under `dlkernels.override()` and after `dlkernels.convert(model)`, samples taken in
turns in one process; above 1 is faster. float32, random weights, dropout off; a training step is forward, loss,
backward and a step of SGD with momentum. The difference is the relative one of logits or loss, the larger of both ways.
Written by `python benchmarks/bench_dropin.py`."""


def report(results: list[DropinResult], environment: dict[str, Any]) -> str:
    """The results as markdown."""
    rows = [
        [
            result.title,
            result.direction,
            f"{result.median[TORCH] * 1e3:.0f}",
            *(f"{result.median[TORCH] / result.median[name]:.2f}" for name in (OVERRIDE, OURS)),
            f"{result.difference:.0e}",
        ]
        for result in results
    ]
    headings = ["model", "", "as it is, ms", "under override", "converted", "difference"]
    table = markdown_table(headings, rows, left=2)
    return "\n".join(["# Models of others", "", circumstances(environment), "", EXPLANATION, "", *table, ""])


def main(arguments: list[str]) -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples; shown, not written")
    options = parser.parse_args(arguments)
    budget = Budget(seconds=1.0, rounds=2) if options.quick else Budget(seconds=20.0, rounds=7)
    console, results, environment = Console(stderr=True), [], info.environment()
    for foreign in foreign_models():
        for result in measure(foreign, budget):
            results.append(result)
            gains = ", ".join(f"{name} {result.median[TORCH] / result.median[name]:.2f}x" for name in (OVERRIDE, OURS))
            console.print(f"{result.title}, {result.direction}: {gains}", highlight=False, soft_wrap=True)
    text = report(results, environment)
    if options.quick:
        print(text, end="")
        return
    path = RESULTS / f"dropin-{'cpu-amx' if environment['isa'] == 'amx' else 'cpu'}.md"
    write_text(path, text)
    facts = {"environment": environment, "results": [asdict(result) for result in results]}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
