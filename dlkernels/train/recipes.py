"""Networks with the data they are trained on, ready to run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import data, models, nn
from ..data import Split
from .loop import Settings, train

# Where modules come from: everything else of a recipe is the same for both.
BACKENDS = {"dlkernels": nn, "torch": torch.nn}


def lenet_on_digits(backend: str = "dlkernels", seed: int = 0) -> tuple[torch.nn.Module, torch.nn.Module, Split]:
    """A LeNet, its loss and scikit-learn's digits; the seed decides the initial weights and the split.

    Raises:
        ValueError: ``backend`` is neither ``"dlkernels"`` nor ``"torch"``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    layers = BACKENDS[backend]
    split = data.load_digits(seed)
    torch.manual_seed(seed)
    model = models.LeNet(image_size=8, num_classes=split.num_classes, layers=layers)
    return model, layers.CrossEntropyLoss(label_smoothing=0.1), split


def some_steps(
    model: torch.nn.Module, loss_function: torch.nn.Module, split: Split, settings: Settings, steps: int = 20
) -> Callable[[], None]:
    """A program of a few training steps like those of a run, to be measured. It moves the weights on."""

    def program() -> None:
        run = train(model, loss_function, split, settings)
        for _ in zip(range(steps), run, strict=False):
            pass

    return program
