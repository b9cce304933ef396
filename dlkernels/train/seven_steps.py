"""The seven-step recipe for training a network, with a verdict for each step and its plot (Li, Johnson & Yeung, CS231n,
lecture 8, 2019; Karpathy, "A recipe for training neural networks", 2019).

1. Check the initial loss. 2. Overfit a few batches. 3. Find a learning rate that makes the loss drop within a hundred
steps. 4. Search coarsely. 5. Refine the search. 6. Read the curves. 7. Repeat. Each step finds another kind of mistake.
:func:`run` takes them all; each can be called alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch

from .. import nn
from ..visualize.figures import save
from ..writing import write_text
from .problem import Curves, Examples, Problem, fit, mean, take_steps
from .search import Parameters, best, random_search
from .verdict import Panel, Verdict, draw_verdict

# What makes training noisy on purpose, and keeps a network from learning by heart.
NOISE = (torch.nn.modules.dropout._DropoutNd, nn.DropConnectLinear, nn.StochasticDepth)
SMALL_WEIGHT_DECAY = 1e-4


def _check_rates(learning_rates: Sequence[float]) -> None:
    if not learning_rates or not all(0 < rate < math.inf for rate in learning_rates):
        raise ValueError(f"learning_rates must be positive, and one at least, got {learning_rates}")


def _without_noise(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, NOISE):
            module.eval()
    return model


# ---- 1. Check the initial loss ---------------------------------------------------------------------------------------


def check_initial_loss(problem: Problem, steps: int = 10, learning_rate: float = 1e-3) -> Verdict:
    """A fresh network has a loss of log C, and each of its parameters gets a gradient within a few small steps.

    Not in the first step: a last layer may start at zero, and then lets no gradient through. Nothing regularises:
    dropout, DropConnect and stochastic depth are off. Finds losses that are no cross-entropy or no mean, initial
    weights that are too large, and dead initialisations.
    """
    model = _without_noise(problem.fresh_network())
    norms = {name: 0.0 for name, parameter in model.named_parameters() if parameter.requires_grad}
    losses = []
    with problem.seeded():
        for loss, _ in take_steps(problem, model, islice(problem.batches(), steps), learning_rate):
            losses.append(loss)
            for name in norms:
                gradient = model.get_parameter(name).grad
                norms[name] += 0.0 if gradient is None else gradient.norm().item() / steps
    dead = [name for name, norm in norms.items() if norm == 0]
    first, expected = losses[0], f"log {problem.num_classes} = {problem.chance_loss:.3g}"
    wrong = _wrong_loss(first / problem.chance_loss, problem.batch_size)
    if wrong is not None:
        finding = f"The loss is {first:.3g}, not {expected}: {wrong}"
    elif dead:
        names = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        finding = f"{len(dead)} of {len(norms)} parameters get no gradient, dead from the start: {names}."
    else:
        finding = f"The loss is {first:.3g}, with {expected}, and all {len(norms)} parameters get a gradient."
    shown = [max(norm, 1e-12) for norm in norms.values()]
    panels = (
        Panel("step", "loss", {"training": (range(len(losses)), losses)}, level=(expected, problem.chance_loss)),
        Panel(
            "parameter, in order",
            "mean length of its gradient",
            {"gradient": (range(len(shown)), shown)},
            log_y=True,
            points=True,
        ),
    )
    return Verdict(1, "Check the initial loss", wrong is None and not dead, finding, panels)


def _wrong_loss(ratio: float, batch_size: int) -> str | None:
    """What is wrong with a first loss of ``ratio`` times what it should be; None if it is near enough."""
    if not math.isfinite(ratio):
        return "the network or the loss computes no number."
    if abs(ratio - 1) <= 0.25:
        return None
    if ratio < 0:
        return "its sign is wrong, or it takes probabilities for their logarithms."
    if 0.75 <= ratio / batch_size <= 1.33:
        return f"with {batch_size} examples in a batch, is it their sum rather than their mean?"
    if ratio > 1:
        return "the network is sure before it has seen anything: are its initial weights too large?"
    return "it is less than that of who knows nothing: is it divided twice, or do the images hold the labels?"


# ---- 2. Overfit a few batches ----------------------------------------------------------------------------------------


def overfit_few_batches(
    problem: Problem, batches: int = 5, steps: int = 300, learning_rates: Sequence[float] = (1e-2, 1e-3)
) -> Verdict:
    """A few batches are learnt by heart at one of the learning rates: all are right, with a tenth of the initial loss.

    Nothing regularises here either. Finds networks that cannot learn, labels that have lost their images, and losses
    that cannot become small.
    """
    _check_rates(learning_rates)
    few = list(islice(problem.batches(), min(batches, problem.steps_per_epoch)))
    runs: dict[float, Curves] = {}
    for rate in learning_rates:
        runs[rate] = _learn_by_heart(problem, few, steps, rate)
        if _is_learnt(problem, runs[rate], len(few)):
            break
    closest = min(runs, key=lambda rate: _recent_loss(runs[rate], len(few)))
    passed, finding = _learnt_finding(problem, runs[closest], len(few))
    finding += f" The learning rate was {closest:g}."
    losses = {f"at {rate:g}": (range(len(curves.losses)), curves.losses) for rate, curves in runs.items()}
    shares = {f"at {rate:g}": (range(len(curves.losses)), curves.accuracies) for rate, curves in runs.items()}
    panels = (Panel("step", "loss", losses), Panel("step", "accuracy", shares))
    return Verdict(2, "Overfit a few batches", passed, finding, panels)


def _learn_by_heart(problem: Problem, few: list[Examples], steps: int, learning_rate: float) -> Curves:
    """Trains on the same batches, in turn, until they are learnt."""
    curves, model = Curves(), _without_noise(problem.fresh_network())
    for loss, right in take_steps(problem, model, islice(cycle(few), steps), learning_rate):
        curves.losses.append(loss)
        curves.accuracies.append(right)
        if _is_learnt(problem, curves, len(few)):
            break
    return curves


def _are_right(curves: Curves, batches: int) -> bool:
    return len(curves.accuracies) >= batches and min(curves.accuracies[-batches:]) == 1


def _recent_loss(curves: Curves, batches: int) -> float:
    loss = mean(curves.losses[-batches:])
    return loss if math.isfinite(loss) else math.inf


def _is_learnt(problem: Problem, curves: Curves, batches: int) -> bool:
    return _are_right(curves, batches) and _recent_loss(curves, batches) <= 0.1 * problem.chance_loss


def _learnt_finding(problem: Problem, curves: Curves, batches: int) -> tuple[bool, str]:
    """Whether the batches were learnt, and what is wrong if not."""
    steps, loss, examples = len(curves.losses), _recent_loss(curves, batches), batches * problem.batch_size
    if _is_learnt(problem, curves, batches):
        return True, f"{examples} examples are learnt by heart in {steps} steps."
    if not math.isfinite(loss):
        return False, f"The loss became {curves.losses[-1]} in step {steps}."
    if _are_right(curves, batches):
        found = f"All {examples} examples are right, but the loss stays at {loss:.3g}"
        return False, f"{found}: is softmax applied twice, or does the loss regularise?"
    right = mean(curves.accuracies[-batches:])
    found = f"After {steps} steps {right:.0%} of {examples} examples are right, with a loss of {loss:.3g}"
    return False, f"{found}: the network cannot learn, or the labels are not those of the images."


# ---- 3. Find a learning rate -----------------------------------------------------------------------------------------


def find_learning_rate(
    problem: Problem, learning_rates: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4), steps: int = 100
) -> Verdict:
    """At one of the learning rates the loss falls by a quarter or more within a hundred steps on all training examples.

    With a small weight decay. ``chosen`` has the rate with the smallest loss. Names those at which the loss diverges.

    Raises:
        ValueError: a learning rate is not positive, or there are none.
    """
    _check_rates(learning_rates)
    runs = {}
    for rate in learning_rates:
        curves = runs[rate] = Curves()
        model = problem.fresh_network()
        with problem.seeded():
            for loss, _ in take_steps(problem, model, islice(problem.batches(), steps), rate, SMALL_WEIGHT_DECAY):
                curves.losses.append(loss)
    first = runs[learning_rates[0]].losses[0]
    stable = {rate: curves.last_loss for rate, curves in runs.items() if not curves.diverged}
    ends = [f"{rate:g} " + (f"to {stable[rate]:.3g}" if rate in stable else "DIVERGES") for rate in runs]
    finding = f"In {steps} steps from a loss of {first:.3g}: {', '.join(ends)}."
    chosen = {}
    if stable:
        rate = min(stable, key=lambda rate: stable[rate])
        chosen = {"learning_rate": rate, "weight_decay": SMALL_WEIGHT_DECAY}
    passed = bool(stable) and min(stable.values()) <= 0.75 * first
    if not passed:
        finding += " None makes the loss fall: try " + ("others." if stable else "smaller ones.")
    panel = Panel(
        "step",
        "loss",
        {f"{rate:g}": (range(len(curves.losses)), curves.losses) for rate, curves in runs.items()},
        log_y=True,
        level=("who knows nothing", problem.chance_loss),
        highest=20 * problem.chance_loss,
    )
    return Verdict(3, "Find a learning rate", passed, finding, (panel,), chosen)


# ---- 4, 5 and 7. Search, refine, repeat ------------------------------------------------------------------------------


def coarse_search(
    problem: Problem, learning_rate: float, trials: int = 8, epochs: int = 1, storage: Path | None = None
) -> Verdict:
    """Random learning rates within a factor of ten, and weight decays from 1e-5 to 1e-1, for an epoch or so.

    ``chosen`` has the best, which must have a quarter less errors than who always guesses the most frequent class.

    Args:
        learning_rate: what to search around.
        trials, storage: as :func:`dlkernels.train.search.random_search` has them.
    """
    low, high = learning_rate / 10, learning_rate * 10
    space = {"learning_rate": (low, high), "weight_decay": (1e-5, 1e-1)}
    chosen, finding, panels = _search(problem, "coarse", space, trials, epochs, storage)
    labels = problem.validation[1]
    errors_of_guessing = 1 - labels.bincount().max().item() / len(labels)
    passed = 1 - chosen["accuracy"] <= 0.75 * errors_of_guessing
    place = math.log(chosen["learning_rate"] / low) / math.log(high / low)
    if not passed:
        finding += f" Guessing is right {1 - errors_of_guessing:.1%} of the times."
    elif not 0.1 <= place <= 0.9:
        finding += " Its learning rate is at the edge of the range: look beyond it."
    return Verdict(4, "Search coarsely", passed, finding, panels, chosen)


def refine_search(
    problem: Problem, around: Parameters, trials: int = 8, epochs: int = 3, storage: Path | None = None
) -> Verdict:
    """Learning rates and weight decays within a factor of three of ``around``, for a few epochs.

    ``chosen`` has the best, which must not be worse by more than a point.
    """
    chosen, finding, panels = _search(problem, "refined", _near(around, 3), trials, epochs, storage)
    passed = chosen["accuracy"] >= around["accuracy"] - 0.01
    if not passed:
        finding += f" The coarse search had {around['accuracy']:.1%} after fewer epochs: the network becomes worse."
    return Verdict(5, "Refine the search", passed, finding, panels, chosen)


def repeat_search(
    problem: Problem, around: Parameters, trials: int = 8, epochs: int = 3, storage: Path | None = None
) -> Verdict:
    """Nearer to ``around`` still, within a factor of one and a half; done when that gains less than half a point.

    ``chosen`` has the best of these and ``around``.
    """
    chosen, finding, panels = _search(problem, "repeated", _near(around, 1.5), trials, epochs, storage)
    gain = chosen["accuracy"] - around["accuracy"]
    passed = gain < 0.005
    finding += f" That gains {100 * gain:.1f} points: " + ("enough." if passed else "go on, from step 5 around it.")
    return Verdict(7, "Repeat", passed, finding, panels, chosen if gain > 0 else around)


def _near(around: Parameters, factor: float) -> dict[str, tuple[float, float]]:
    return {name: (around[name] / factor, around[name] * factor) for name in ("learning_rate", "weight_decay")}


def _search(
    problem: Problem,
    name: str,
    space: dict[str, tuple[float, float]],
    trials: int,
    epochs: int,
    storage: Path | None,
) -> tuple[Parameters, str, tuple[Panel, ...]]:
    """The best settings with their accuracy, that in words, and the accuracies of all over each setting."""

    def score(settings: Parameters) -> float:
        return fit(problem, epochs, **settings).final_accuracy

    identity = f"{problem.checksum()}, {epochs} epochs"
    found = random_search(score, space, trials, seed=problem.seed, storage=storage, name=name, identity=identity)
    winner = best(found)
    settings = ", ".join(f"{setting} {value:.3g}" for setting, value in winner.parameters.items())
    finding = (
        f"The best of {trials} is right {winner.score:.1%} of the times after {_count(epochs, 'epoch')}: {settings}."
    )
    scores = [trial.score for trial in found]
    panels = tuple(
        Panel(
            setting.replace("_", " "),
            "validation accuracy",
            {"trials": ([trial.parameters[setting] for trial in found], scores)},
            log_x=True,
            points=True,
        )
        for setting in space
    )
    return {**winner.parameters, "accuracy": winner.score}, finding.replace("_", " "), panels


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# ---- 6. Read the curves ----------------------------------------------------------------------------------------------


def read_curves(curves: Curves) -> Verdict:
    """What the curves of a long run say is to be changed."""
    passed, finding = _reading(curves)
    epochs = range(1, len(curves.train_loss) + 1)
    panels = (
        Panel("step", "loss", {"training": (range(1, len(curves.losses) + 1), curves.losses)}, log_y=True),
        Panel(
            "epoch", "loss", {"training": (epochs, curves.train_loss), "validation": (epochs, curves.validation_loss)}
        ),
        Panel(
            "epoch",
            "accuracy",
            {"training": (epochs, curves.train_accuracy), "validation": (epochs, curves.validation_accuracy)},
        ),
    )
    return Verdict(6, "Read the curves", passed, finding, panels)


def _reading(curves: Curves) -> tuple[bool, str]:
    """Whether they are as they should be, and what they say."""
    if curves.diverged or not curves.validation_loss:
        return False, f"The loss diverges to {curves.last_loss:.3g}: a smaller learning rate."
    first, fifth = curves.losses[0], len(curves.losses) // 5
    start = curves.losses[max(0, fifth - 10) : fifth + 1]
    if mean(start) > 0.9 * first and curves.last_loss < 0.5 * first:
        return False, "The loss is flat at first and falls late: better initial values, or warm-up."
    training, validation = curves.train_accuracy[-1], curves.validation_accuracy[-1]
    losses = curves.validation_loss
    lowest = losses.index(min(losses))
    if losses[-1] > 1.2 * losses[lowest]:
        return False, f"The validation loss rises after epoch {lowest + 1}: stop there, or regularise more."
    if training - validation > 0.1:
        found = f"Training is right {training:.1%} of the times, validation {validation:.1%}"
        return False, f"{found}: the network overfits; regularise more, or find more data."
    if len(losses) > 1 and losses[-1] < 0.95 * losses[-2] and validation < 0.99:
        return True, f"Validation is right {validation:.1%} of the times and its loss still falls: train longer."
    if training < 0.9 and training - validation < 0.02:
        return False, f"Training itself is right only {training:.1%} of the times: a larger network, or other settings."
    return True, f"Training is right {training:.1%} of the times, validation {validation:.1%}, and both are at rest."


# ---- All of them -----------------------------------------------------------------------------------------------------


def run(
    problem: Problem,
    folder: Path,
    learning_rates: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    trials: int = 8,
    epochs: int = 6,
) -> Iterator[Verdict]:
    """Takes the steps, one for each item, and stops after one of the first four that fails.

    Args:
        folder: where each verdict is written to ``verdicts.md`` and its plot beside it as PNG. ``searches.sqlite``
            keeps the trials, so that a run that was interrupted goes on with them.
        learning_rates: what the third step tries.
        trials: of each of the three searches.
        epochs: of the run whose curves are read; the searches take one and half as many.

    Raises:
        OSError: a file cannot be written; the error names it.
        ValueError: an argument is out of range, or the folder has searches of another problem.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = ""
    write_text(folder / "verdicts.md", text)
    for verdict in _steps(problem, folder / "searches.sqlite", learning_rates, trials, epochs):
        picture = f"{verdict.step}_{verdict.title.lower().replace(' ', '_')}.png"
        save(draw_verdict(verdict), folder / picture)
        text += f"{verdict}\n\n![{verdict.title}]({picture})\n\n"
        write_text(folder / "verdicts.md", text)
        yield verdict
        if not verdict.passed and verdict.step <= 4:
            return


def _steps(
    problem: Problem, storage: Path, learning_rates: Sequence[float], trials: int, epochs: int
) -> Iterator[Verdict]:
    yield check_initial_loss(problem)
    yield overfit_few_batches(problem)
    yield (found := find_learning_rate(problem, learning_rates))
    yield (coarse := coarse_search(problem, found.chosen["learning_rate"], trials, 1, storage))
    fewer = (epochs + 1) // 2
    yield (refined := refine_search(problem, coarse.chosen, trials, fewer, storage))
    settings = refined.chosen
    yield read_curves(fit(problem, epochs, settings["learning_rate"], settings["weight_decay"]))
    yield repeat_search(problem, settings, trials, fewer, storage)
