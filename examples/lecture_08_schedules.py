"""Lecture 8: the learning rate over time, when to stop, and what keeps a network from learning its examples by heart.

A large learning rate finds the valley, a small one its floor; a schedule has both, and a warm-up the patience for the
first steps. A batch four times as large takes a quarter of the steps and a rate four times as large. Training stops
where the validation loss has stopped falling, and takes back the weights of its best epoch. And with few examples
whatever makes training harder may help: dropout, DropConnect, stochastic depth, fractional max pooling, mixed and
damaged images, smoothed labels, each a setting of the trainer or an argument of the network. Which of them does, with
this network and this data, is for validation to say.

The standard form differs from the lecture's in this:

- Early stopping watches the validation loss. Who watches the test loss has chosen the weights by it.
- Dropout zeroes activations, DropConnect weights, stochastic depth whole branches. With a probability p of dropping,
  what stays is divided by 1 - p while training, and evaluation leaves everything as it is.
- The linear scaling rule is for plain and momentum SGD, from a warm-up on, and holds up to some size of the batch.
- Fractional max pooling draws its regions in evaluation too: the answers of several drawings are averaged.
- Mixup mixes the labels as it mixes the images; label smoothing comes on top of that.

Run it: ``python examples/lecture_08_schedules.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lesson import accuracy, arguments, console, panels, save_figure, show_table
from rich.progress import track
from torch import Tensor

from dlkernels import data, models, nn, train
from dlkernels.train import SCHEDULES, Progress, Settings, Trainer, ensemble
from dlkernels.train.optimizers import Schedule

# ---- Schedules -------------------------------------------------------------------------------------------------------

STEPS, PER_EPOCH = 300, 10
# Validation losses of 30 epochs, with three plateaus.
LOSSES = (
    [1.0, 0.7, 0.5, 0.4, 0.35] + [0.33] * 5 + [0.2, 0.15, 0.13, 0.12] + [0.11] * 5 + [0.1, 0.09, 0.085] + [0.08] * 8
)


def factors(name: str, warmup: float) -> list[float]:
    """What a schedule multiplies the peak rate with, in each step of a run whose validation losses are ``LOSSES``."""
    schedule, found = Schedule(name, STEPS, warmup), []
    for step in range(STEPS):
        found.append(schedule.factor(step))
        if (step + 1) % PER_EPOCH == 0:
            schedule.observe(LOSSES[step // PER_EPOCH])
    return found


def torchs_factors(name: str) -> list[float]:
    """The same without warm-up, by ``torch.optim.lr_scheduler``."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    lr = torch.optim.lr_scheduler
    schedulers: dict[str, Callable[[], Any]] = {
        "constant": lambda: lr.ConstantLR(optimizer, 1.0),
        "step": lambda: lr.StepLR(optimizer, STEPS // 3, 0.1),
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, STEPS),
        "linear": lambda: lr.PolynomialLR(optimizer, STEPS, power=1.0),
        "inverse_sqrt": lambda: lr.LambdaLR(optimizer, lambda step: (step + 1) ** -0.5),
        "plateau": lambda: lr.ReduceLROnPlateau(optimizer, factor=0.1, patience=Schedule.PATIENCE - 1, threshold=0),
    }
    scheduler, found = schedulers[name](), []
    for step in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if name != "plateau":
            scheduler.step()
        elif (step + 1) % PER_EPOCH == 0:
            scheduler.step(LOSSES[step // PER_EPOCH])
    return found


def schedules(epochs: int, output: Path) -> None:
    """Every schedule, with and without warm-up; then a LeNet trained by each."""
    figure, axes = panels(2, len(SCHEDULES), "Learning-rate schedules, and a LeNet on digits trained by each", 2.6, 2.3)
    rows = []
    for (above, below), name in zip(axes.T, SCHEDULES, strict=True):
        above.plot(factors(name, 0.1), label="after a warm-up")
        above.plot(factors(name, 0.0), ":", label="without")
        above.set(xlabel="step", ylim=(-0.05, 1.1))
        above.set_title(name, fontsize=9)
        settings = {
            "epochs": epochs,
            "schedule": name,
            "optimizer": "momentum",
            "learning_rate": 0.1,
            "label_smoothing": 0.0,
        }
        trainer = train.prepare(train.recipe("lenet", "digits", settings=settings))
        run = list(trainer.run())
        validated = [progress.validation["loss"] for progress in run if progress.validation]
        below.plot([progress.losses["loss"] for progress in run], linewidth=0.6, label="training")
        steps = range(trainer.steps_per_epoch, trainer.steps + 1, trainer.steps_per_epoch)
        below.plot(steps, validated, ".-", markersize=3, label="validation")
        below.set(xlabel="step", yscale="log", ylim=(1e-4, 5))
        difference = max(abs(a - b) for a, b in zip(factors(name, 0.0), torchs_factors(name), strict=True))
        rows.append((name, f"{difference:.0e}", min(validated), validated[-1], trainer.finish()["accuracy"]))
    axes[0, 0].set_ylabel("factor of the peak rate")
    axes[1, 0].set_ylabel("loss")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    columns = ("schedule", "difference from torch's", "least validation loss", "last", "test accuracy")
    show_table(f"LeNet on digits, {epochs} epochs", columns, rows)
    save_figure(figure, output / "schedules.png")


def linear_scaling(epochs: int, output: Path) -> None:
    """A batch four times as large, at the same rate and at four times the rate, against the smaller one."""
    runs: dict[str, dict[str, Any]] = {
        "batches of 32": {"batch_size": 32},
        "batches of 128, the same rate": {"batch_size": 128},
        "batches of 128, four times the rate": {"batch_size": 128, "scale_rate": 32},
    }
    figure, axes = panels(1, 1, "The linear scaling rule, LeNet on digits, plain SGD", 6.5, 4.0)
    rows = []
    for name, changes in runs.items():
        settings = {"epochs": epochs, "optimizer": "sgd", "learning_rate": 0.02, "schedule": "constant", **changes}
        trainer = train.prepare(train.recipe("lenet", "digits", settings=settings))
        run = list(trainer.run())
        validated = [progress.validation["loss"] for progress in run if progress.validation]
        axes[0, 0].plot(range(1, epochs + 1), validated, ".-", label=name)
        middle = validated[len(validated) // 2]
        rows.append((name, trainer.steps, f"{trainer.settings.peak_rate:g}", middle, validated[-1]))
    axes[0, 0].set(xlabel="epoch", ylabel="validation loss", yscale="log")
    axes[0, 0].legend(fontsize=8)
    columns = ("", "steps", "rate", f"validation loss after {epochs // 2 + 1} epochs", f"after {epochs}")
    show_table("The linear scaling rule", columns, rows)
    save_figure(figure, output / "linear_scaling.png")


# ---- When to stop ----------------------------------------------------------------------------------------------------


FEW = 100


def few_digits(wrong: int = 0) -> data.ClassifiedImages:
    """The digits with only a hundred training examples, so many of which have labels at random."""
    digits = data.load("digits")
    assert isinstance(digits, data.ClassifiedImages)
    images, labels = digits.train[0][:FEW], digits.train[1][:FEW].clone()
    labels[:wrong] = torch.randint(digits.num_classes, (wrong,))
    return replace(digits, train=(images, labels))


def trainer_of(model: torch.nn.Module, digits: data.ClassifiedImages, **settings: Any) -> Trainer:
    """A trainer with AdamW and batches of 25."""
    chosen = {"batch_size": 25, "optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.0, **settings}
    return Trainer(model, train.task_for("mlp"), digits, Settings(**chosen))


def early_stop(epochs: int, output: Path) -> None:
    """A network that would learn digits by heart, wrong ones too, stops ten epochs after its best and returns to it."""
    digits = few_digits(FEW // 5)

    def run(patience: int | None) -> tuple[Trainer, list[Progress]]:
        torch.manual_seed(0)
        trainer = trainer_of(models.MLP(64, (200, 200)), digits, epochs=epochs, schedule="constant", patience=patience)
        return trainer, list(trainer.run())

    endless, curve = run(None)
    stopped, until = run(10)
    validated = [progress.validation["loss"] for progress in curve if progress.validation]
    size = stopped.steps_per_epoch
    trained = torch.tensor([progress.losses["loss"] for progress in curve]).view(-1, size).mean(1)
    best, end = stopped.best_step // size, len(until) // size
    last = stopped.evaluate(digits.validation)
    test = stopped.finish()  # restores the best weights
    restored = stopped.evaluate(digits.validation)
    rows = [
        (f"the epoch of the stop, {end}", last["loss"], last["accuracy"], "", ""),
        (f"restored, of epoch {best}", restored["loss"], restored["accuracy"], test["loss"], test["accuracy"]),
    ]
    never, untested = endless.finish(), endless.evaluate(digits.validation)
    rows.append((f"without a stop, {epochs}", untested["loss"], untested["accuracy"], never["loss"], never["accuracy"]))
    columns = ("weights of", "validation loss", "accuracy", "test loss", "accuracy")
    show_table(f"Early stopping, {FEW} training digits, {FEW // 5} of them with labels at random", columns, rows)

    figure, axes = panels(1, 1, "Early stopping on the validation loss", 6.5, 4.0)
    axes[0, 0].plot(range(1, epochs + 1), trained, label="training")
    axes[0, 0].plot(range(1, epochs + 1), validated, label="validation")
    axes[0, 0].plot(best, restored["loss"], "*", markersize=12, color="red", label=f"restored: epoch {best}")
    axes[0, 0].axvline(end, color="black", linestyle="--", linewidth=1, label=f"stop: epoch {end}")
    axes[0, 0].set(xlabel="epoch", ylabel="loss", yscale="log")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, output / "early_stopping.png")


# ---- What makes training harder --------------------------------------------------------------------------------------


class ResidualMLP(torch.nn.Module):
    """Images of 64 pixels to logits: blocks ``x + branch(x)``, of which training leaves out the later the more often.

    Args:
        blocks: how many.
        stochastic_depth: probability of leaving out the last; that of the others grows in proportion to their number.
    """

    def __init__(self, blocks: int, stochastic_depth: float) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 64)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                nn.BatchNorm1d(64),
                torch.nn.ReLU(),
                nn.Linear(64, 64),
                nn.StochasticDepth(stochastic_depth * block / blocks, "row"),
            )
            for block in range(1, blocks + 1)
        )
        self.scores = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.scores(x)


def what_is_dropped() -> None:
    """Ones that go through each kind of dropping: what becomes of them in training and in evaluation."""
    weight = nn.DropConnectLinear(1000, 1000, bias=False, p=0.25)
    torch.nn.init.ones_(weight.weight)
    layers: dict[str, tuple[str, torch.nn.Module, Tensor]] = {
        "dropout": ("activations", torch.nn.Dropout(0.25), torch.ones(1000, 1000)),
        "DropConnect": ("weights", weight, torch.eye(1000)),  # the output is the weight
        "stochastic depth": ("branches", nn.StochasticDepth(0.25, "row"), torch.ones(1000, 1000)),
    }
    rows = []
    for name, (what, layer, x) in layers.items():
        with torch.no_grad():
            trained, evaluated = layer(x), layer.eval()(x)
        values = " or ".join(f"{value:.4g}" for value in trained.unique().tolist())
        zero = trained.eq(0).double().mean().item()
        rows.append((name, what, values, zero, trained.mean().item(), evaluated.mean().item()))
    columns = ("p = 0.25", "drops", "a one becomes", "share dropped", "mean in training", "in evaluation")
    show_table("What is dropped, and that the mean stays", columns, rows)


def regularisers(epochs: int, seeds: int) -> None:
    """Train and test figures with few training digits, without and with each."""
    digits = few_digits()
    test = digits.batch(digits.test, torch.arange(len(digits.test[0])))

    def mlp(**chosen: Any) -> Callable[[], torch.nn.Module]:
        return lambda: models.MLP(64, (200, 200), **chosen)

    def conv(**chosen: Any) -> Callable[[], torch.nn.Module]:
        return lambda: models.ThreeLayerConvNet(8, 1, kernel_size=3, batch_norm=True, **chosen)

    choices: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any]]] = {
        "MLP": (mlp(), {}),
        "MLP, dropout 0.5": (mlp(dropout=0.5), {}),
        "MLP, DropConnect 0.5": (mlp(drop_connect=0.5), {}),
        "16 residual blocks": (lambda: ResidualMLP(16, 0.0), {}),
        "16 residual blocks, stochastic depth 0.5": (lambda: ResidualMLP(16, 0.5), {}),
        "ConvNet": (conv(), {}),
        "ConvNet, fractional max pooling 0.7": (conv(fractional_pooling=0.7), {}),
        "ConvNet, label smoothing 0.1": (conv(), {"label_smoothing": 0.1}),
        "ConvNet, Cutout 3": (conv(), {"cutout": 3}),
        "ConvNet, Mixup 0.4": (conv(), {"mixup": 0.4}),
        "ConvNet, CutMix 1": (conv(), {"cutmix": 1.0}),
        "ConvNet, Mixup 0.4, label smoothing 0.1": (conv(), {"mixup": 0.4, "label_smoothing": 0.1}),
    }
    rows = []
    for name, (build, settings) in track(
        choices.items(), "regularisers", console=console, transient=True, disable=not console.is_terminal
    ):
        found, averaged = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            trainer = trainer_of(build(), digits, epochs=epochs, seed=seed, **settings)
            list(trainer.run())
            tested, trained = trainer.finish(), trainer.evaluate(digits.train)
            found.append((trained["accuracy"], tested["accuracy"], trained["loss"], tested["loss"]))
            if "fractional" in name:
                eight = ensemble.TestTimeAugmentation(trainer.model, [lambda images: images] * 8)
                averaged.append(accuracy(eight, *test))
        rows.append((name, *map(statistics.mean, zip(*found, strict=True))))
        if averaged:
            rows.append(("the same, mean of 8 answers", "", statistics.mean(averaged), "", ""))
    columns = ("", "train accuracy", "test accuracy", "train loss", "test loss")
    show_table(f"{FEW} training digits, {epochs} epochs, mean over {seeds} seeds", columns, rows)


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_08_schedules", __doc__)
    torch.manual_seed(0)
    fast = options.fast
    schedules(1 if fast else 10, options.output)
    linear_scaling(1 if fast else 12, options.output)
    early_stop(12 if fast else 80, options.output)
    what_is_dropped()
    regularisers(1 if fast else 60, 1 if fast else 2)


if __name__ == "__main__":
    main()
