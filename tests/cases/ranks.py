"""Runs that several processes compute together, for ``test_distributed.py``: what each rank found goes to a file."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dlkernels import train
from dlkernels.models import registry
from dlkernels.train import Trainer, checkpoint, distributed

from .training import BUILDERS

STEPS = 12  # of which six are an epoch

# Without batch norm and without random numbers: two processes compute what one does.
CASES: dict[str, dict[str, Any]] = {
    "classifier": {"network": "tinyclassifier"},
    "captioner, parts of different numbers of words": {"network": "tinycaptioner", "settings": {"optimizer": "sgd"}},
    "two players": {"network": "tinygan", "arguments": {"noise": 0.0}, "settings": {"learning_rate": 1e-2}},
    "accumulated, clipped, averaged": {
        "network": "tinyclassifier",
        "settings": {"accumulate": 5, "clip_norm": 0.05, "ema": 0.5, "optimizer": "momentum"},
    },
}


def prepared(network: str, settings: dict[str, Any] | None = None, **options: Any) -> Trainer:
    settings = {"epochs": 2, "batch_size": 300, "schedule": "constant", **(settings or {})}
    return train.prepare(train.recipe(network, "synthetic", settings=settings, image_size=4, **options))


def found(trainer: Trainer) -> dict[str, Any]:
    """The figures of a run, and the sums and squares of its weights."""
    steps = [(progress.losses, progress.validation) for progress in trainer.run()]
    test = trainer.finish()
    weights = {name: tensor.flatten().tolist() for name, tensor in trainer.model.state_dict().items()}
    return {"steps": steps, "test": test, "weights": weights}


def resumed_equals_whole(folder: Path) -> bool:
    """Whether a run with dropout, batch norm and mixed images goes on, from a checkpoint of all ranks, bit for bit."""
    case: dict[str, Any] = {
        "network": "tinyclassifier",
        "arguments": {"dropout": 0.3, "noise": 0.1, "norm": True},
        "settings": {"mixup": 0.4, "cutmix": 1.0, "cutout": 2},
    }
    whole = prepared(**case)
    list(whole.run())
    started = prepared(**case)
    list(itertools.islice(checkpoint.saved(started.run(), started, folder, {}, every=1), 8))
    distributed.gather("")  # rank 0 has written
    resumed = prepared(**case)
    torch.rand(3)
    checkpoint.resume(resumed, folder)
    list(resumed.run())
    own, expected = resumed.model.state_dict(), whole.model.state_dict()
    parameters = [name for name, _ in whole.model.named_parameters()]
    return all(torch.equal(own[name], expected[name]) for name in parameters)


class Interrupted(Exception):
    """Ends the runs with a traceback that holds them."""


def interrupted_run() -> None:
    trainer = prepared("tinyclassifier")
    for _ in trainer.run():
        raise Interrupted


def compute(folder: Path) -> dict[str, Any]:
    """Everything that the tests look at."""
    results: dict[str, Any] = {name: found(prepared(**case)) for name, case in CASES.items()}
    results["resumed"] = resumed_equals_whole(folder / "run")
    return results


def main(folder: Path) -> None:
    registry._builders.update(BUILDERS)
    torch.set_num_threads(1)
    path = folder / f"{os.environ['RANK']}.json"
    try:
        with distributed.processes("cpu"):
            results = compute(folder)
            interrupted_run()
    except Interrupted:
        results["left over"] = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
