"""The recipe: the right verdict for a healthy network and for each planted defect."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import data, models, nn
from dlkernels.train import problem as problems
from dlkernels.train import seven_steps
from dlkernels.train.problem import Curves, Problem
from dlkernels.train.verdict import Verdict

pytest.importorskip("sklearn")
matplotlib = pytest.importorskip("matplotlib")

Loss = Callable[[Any, Tensor], Tensor]
cross_entropy = nn.CrossEntropyLoss()


@cache
def examples() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits to train on and to validate with."""
    digits = data.load_digits(0)
    images, labels = digits.train_images, digits.train_labels
    return (images[:1100], labels[:1100]), (images[1100:], labels[1100:])


def lenet() -> torch.nn.Module:
    return models.LeNet(8)


def problem(build: Callable[[], torch.nn.Module] = lenet, loss: Loss = cross_entropy, **arguments: Any) -> Problem:
    train, validation = examples()
    return Problem(build, loss, **{"train": train, "validation": validation, "num_classes": 10, **arguments})


def filled(fill: Callable[[torch.nn.Parameter], object]) -> Callable[[], torch.nn.Module]:
    """A network with two hidden layers and other initial values."""

    def build() -> torch.nn.Module:
        model = models.MLP(64, (32, 32))
        for parameter in model.parameters():
            fill(parameter)
        return model

    return build


def never_firing() -> torch.nn.Module:
    """A network whose first ReLUs are negative for every image."""
    model = models.MLP(64, (32, 32))
    first: Any = model.hidden[0]
    torch.nn.init.constant_(first.bias, -1e3)
    return model


class Blind(torch.nn.Module):
    """A network that its images do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.network = models.LeNet(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(0 * x)


class Tokens(torch.nn.Module):
    """A vision transformer, whose last layer starts at zero, for images with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.network = models.VisionTransformer(8, 2, 1, 2, 16, 32, num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.expand(-1, 3, -1, -1))


def noisy() -> torch.nn.Module:
    """A network that regularises so much that it learns nothing by heart while it does."""
    hidden = nn.DropConnectLinear(64, 100, p=0.9)
    return torch.nn.Sequential(torch.nn.Flatten(), hidden, torch.nn.Dropout(0.9), torch.nn.ReLU(), nn.Linear(100, 10))


# ---- 1. Check the initial loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lenet, Tokens, noisy, partial(models.LinearClassifier, 64)])
def test_a_healthy_network_starts_at_log_c(build: Callable[[], torch.nn.Module]) -> None:
    verdict = seven_steps.check_initial_loss(problem(build))
    assert verdict.passed, verdict
    assert "log 10 = 2.3" in verdict.finding


@pytest.mark.parametrize(
    ("build", "loss", "finding"),
    [
        (lenet, nn.CrossEntropyLoss(reduction="sum"), "with 32 examples in a batch, is it their sum"),
        (lenet, lambda x, y: -cross_entropy(x, y), "its sign is wrong"),
        (lenet, lambda x, y: cross_entropy(x, y) / 10, "is it divided twice"),
        (lenet, lambda x, y: cross_entropy(x, y) * math.nan, "The loss is nan"),
        (lenet, lambda x, y: cross_entropy(x.detach(), y), "12 of 12 parameters get no gradient"),
        (filled(lambda p: torch.nn.init.normal_(p)), cross_entropy, "are its initial weights too large"),
        (
            filled(torch.nn.init.zeros_),
            cross_entropy,
            "5 of 6 parameters get no gradient, dead from the start: hidden.0",
        ),
        (
            never_firing,
            cross_entropy,
            "3 of 6 parameters get no gradient, dead from the start: hidden.0.weight, hidden",
        ),
    ],
    ids=["sum", "sign", "divided", "nan", "detached", "large", "zero", "never firing"],
)
def test_a_broken_loss_and_a_dead_initialisation_are_named(
    build: Callable[[], torch.nn.Module], loss: Loss, finding: str
) -> None:
    verdict = seven_steps.check_initial_loss(problem(build, loss))
    assert not verdict.passed
    assert finding in verdict.finding


# ---- 2. Overfit a few batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [lenet, noisy])
def test_a_healthy_network_learns_a_few_batches_by_heart(build: Callable[[], torch.nn.Module]) -> None:
    verdict = seven_steps.overfit_few_batches(problem(build))
    assert verdict.passed, verdict
    assert "160 examples are learnt by heart" in verdict.finding


def test_fewer_examples_than_batches_asked_for_are_enough() -> None:
    images, labels = examples()[0]
    verdict = seven_steps.overfit_few_batches(problem(train=(images[:70], labels[:70])))
    assert verdict.passed, verdict
    assert "64 examples" in verdict.finding


@pytest.mark.parametrize(
    ("build", "loss", "finding"),
    [
        (lenet, lambda x, y: cross_entropy(x.softmax(1), y), "the loss stays at 1.46: is softmax applied twice"),
        (Blind, cross_entropy, "the network cannot learn"),
        (filled(torch.nn.init.zeros_), cross_entropy, "the network cannot learn"),
        (lenet, lambda x, y: cross_entropy(x, torch.randint_like(y, 10)), "the labels are not those of the images"),
        (lenet, lambda x, y: cross_entropy(x, y) * math.nan, "The loss became nan in step 1"),
    ],
    ids=["two softmaxes", "blind", "dead", "other labels each time", "nan"],
)
def test_what_cannot_learn_is_named(build: Callable[[], torch.nn.Module], loss: Loss, finding: str) -> None:
    verdict = seven_steps.overfit_few_batches(problem(build, loss), learning_rates=[1e-3])
    assert not verdict.passed
    assert finding in verdict.finding


# ---- 3. Find a learning rate -----------------------------------------------------------------------------------------


def test_a_learning_rate_of_a_thousand_is_flagged_and_a_good_one_chosen() -> None:
    verdict = seven_steps.find_learning_rate(problem(), (1e3, 1e-2, 1e-3, 1e-6))
    assert verdict.passed, verdict
    assert "1000 DIVERGES" in verdict.finding
    assert verdict.finding.count("DIVERGES") == 1
    assert verdict.chosen["learning_rate"] in (1e-2, 1e-3)


@pytest.mark.parametrize(
    ("rates", "finding"), [((1e3,), "1000 DIVERGES. None makes the loss fall: try smaller"), ((1e-7,), "try others")]
)
def test_rates_of_which_none_is_good_are_refused(rates: tuple[float, ...], finding: str) -> None:
    for optimizer in (problems.adamw, lambda p, rate, decay: torch.optim.SGD(p, rate, weight_decay=decay)):
        verdict = seven_steps.find_learning_rate(problem(optimizer=optimizer), rates)
        assert not verdict.passed
        assert finding in verdict.finding


# ---- 4 to 7 ----------------------------------------------------------------------------------------------------------


def test_the_recipe_trains_a_healthy_network_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    own = problem(seed=1)
    before = torch.get_rng_state()
    verdicts = list(seven_steps.run(own, tmp_path, (1e3, 1e-3), trials=4, epochs=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert [verdict.step for verdict in verdicts] == [1, 2, 3, 4, 5, 6, 7]
    assert all(verdict.passed for verdict in verdicts[:6]), "\n".join(map(str, verdicts))
    assert verdicts[4].chosen["accuracy"] >= 0.95
    text = (tmp_path / "verdicts.md").read_text()
    for verdict in verdicts:
        assert str(verdict) in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(pictures) == 7
    for name in pictures:
        assert f"({name})" in text
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.02

    runs: list[int] = []
    fit = seven_steps.fit
    monkeypatch.setattr(seven_steps, "fit", lambda *arguments, **named: runs.append(1) or fit(*arguments, **named))
    monkeypatch.setattr(seven_steps, "save", lambda figure, path: None)
    assert list(seven_steps.run(own, tmp_path, (1e3, 1e-3), trials=4, epochs=4)) == verdicts
    assert len(runs) == 1  # the searches are all there; the curves are drawn again
    with pytest.raises(ValueError, match="has a study 'coarse' with another identity"):
        list(seven_steps.run(problem(seed=2), tmp_path, (1e3, 1e-3), trials=4, epochs=4))


def test_the_recipe_stops_at_the_first_step_that_fails(tmp_path: Path) -> None:
    verdicts = list(seven_steps.run(problem(loss=nn.CrossEntropyLoss(reduction="sum")), tmp_path))
    assert [verdict.step for verdict in verdicts] == [1]
    assert (tmp_path / "1_check_the_initial_loss.png").exists()
    assert "FAILED" in (tmp_path / "verdicts.md").read_text()


def test_a_search_that_finds_nothing_better_than_guessing_fails() -> None:
    pytest.importorskip("optuna")
    (images, labels), validation = examples()
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    verdict = seven_steps.coarse_search(problem(train=(images, shuffled)), 1e-3, trials=2)
    assert not verdict.passed
    assert "Guessing is right 1" in verdict.finding  # by the most frequent class


def test_a_best_rate_at_the_edge_of_the_range_is_named() -> None:
    pytest.importorskip("optuna")
    verdict = seven_steps.coarse_search(problem(), 1e-4, trials=6)
    assert verdict.chosen["learning_rate"] > 10 ** (-3.2)
    assert "at the edge of the range" in verdict.finding


def test_refining_and_repeating_compare_with_what_they_start_from() -> None:
    pytest.importorskip("optuna")
    around = {"learning_rate": 3e-3, "weight_decay": 1e-4, "accuracy": 0.5}
    refined = seven_steps.refine_search(problem(), around, trials=2, epochs=1)
    assert refined.passed
    for name in ("learning_rate", "weight_decay"):
        assert around[name] / 3 <= refined.chosen[name] <= around[name] * 3
    repeated = seven_steps.repeat_search(problem(), around, trials=2, epochs=1)
    assert not repeated.passed and "go on, from step 5" in repeated.finding
    assert repeated.chosen["accuracy"] > 0.5
    better = {**around, "accuracy": 1.0}
    worse = seven_steps.refine_search(problem(), better, trials=2, epochs=1)
    assert not worse.passed and "the network becomes worse" in worse.finding
    done = seven_steps.repeat_search(problem(), better, trials=2, epochs=1)
    assert done.passed and done.chosen == better


# ---- 6. Read the curves ----------------------------------------------------------------------------------------------


def curves(
    losses: list[float] | None = None,
    train_accuracy: float = 0.99,
    validation_accuracy: float = 0.97,
    validation_loss: tuple[float, ...] = (0.5, 0.3, 0.2, 0.2),
) -> Curves:
    """A run of 100 steps and as many epochs as there are validation losses."""
    losses = losses or [2.3 * 0.95**step for step in range(100)]
    count = len(validation_loss)
    rising = [(epoch + 1) / count for epoch in range(count)]
    return Curves(
        losses=losses,
        accuracies=[0.5] * len(losses),
        train_loss=[0.1] * count,
        train_accuracy=[train_accuracy * share for share in rising],
        validation_loss=list(validation_loss),
        validation_accuracy=[validation_accuracy * share for share in rising],
    )


@pytest.mark.parametrize(
    ("run", "passed", "finding"),
    [
        (curves(), True, "both are at rest"),
        (curves(validation_loss=(0.5, 0.4, 0.3, 0.2)), True, "its loss still falls: train longer"),
        (curves(validation_loss=(0.5, 0.2, 0.3, 0.4)), False, "rises after epoch 2: stop there"),
        (curves(validation_accuracy=0.8), False, "the network overfits"),
        (curves(train_accuracy=0.7, validation_accuracy=0.7), False, "Training itself is right only 70.0%"),
        (curves([2.3] * 60 + [0.1] * 40), False, "flat at first and falls late"),
        (curves([2.3, 9.0, 1e5]), False, "diverges to 3.33e+04"),
        (curves([2.3, math.nan]), False, "diverges to nan"),
        (curves(validation_loss=()), False, "diverges"),
    ],
)
def test_curves_are_read(run: Curves, passed: bool, finding: str) -> None:
    verdict = seven_steps.read_curves(run)
    assert (verdict.step, verdict.passed) == (6, passed), verdict
    assert finding in verdict.finding


def test_a_real_run_that_overfits_is_read_so() -> None:
    images, labels = examples()[0]
    few = problem(lambda: models.MLP(64, (100,)), train=(images[:64], labels[:64]))
    verdict = seven_steps.read_curves(problems.fit(few, 40, 1e-2, 0.0))
    assert not verdict.passed
    assert "overfits" in verdict.finding or "rises after" in verdict.finding


# ---- The runs underneath ---------------------------------------------------------------------------------------------


def test_curves_hold_every_step_and_every_epoch() -> None:
    own = problem()
    run = problems.fit(own, 2, 1e-3, 0.0)
    size = 1100 // 32
    assert own.steps_per_epoch == size
    assert len(run.losses) == len(run.accuracies) == 2 * size
    assert run.train_loss == pytest.approx([sum(run.losses[:size]) / size, sum(run.losses[size:]) / size])
    assert run.train_accuracy == pytest.approx([sum(run.accuracies[:size]) / size, sum(run.accuracies[size:]) / size])
    assert len(run.validation_loss) == len(run.validation_accuracy) == 2
    assert run.validation_accuracy[-1] > 0.7 > 3 * run.validation_loss[-1] - 1
    assert problems.fit(own, 2, 1e-3, 0.0) == run  # the same every time
    assert problems.fit(problem(seed=1), 2, 1e-3, 0.0) != run


def test_validation_neither_trains_nor_ends_training() -> None:
    own = problem()
    model = own.fresh_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, share = problems.validate(own, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        logits = model.eval()(own.validation[0])
    assert loss == pytest.approx(cross_entropy(logits, own.validation[1]).item(), rel=1e-5)
    assert share == pytest.approx((logits.argmax(1) == own.validation[1]).double().mean().item())


def test_a_run_ends_where_the_loss_is_no_number() -> None:
    calls = 0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(logits, labels) * (math.inf if calls == 4 else 1.0)

    run = problems.fit(problem(loss=loss), 2, 1e-3, 0.0)
    assert len(run.losses) == 4 and run.losses[-1] == math.inf
    assert run.diverged
    assert run.validation_loss == []


def test_batches_are_every_example_once_an_epoch_in_another_order_each_time() -> None:
    images = torch.arange(10.0).view(-1, 1, 1, 1)
    labels = torch.arange(10) % 2
    own = problem(train=(images, labels), validation=(images, labels), num_classes=2, batch_size=4)
    drawn = own.batches()
    epochs = [torch.cat([next(drawn)[0] for _ in range(2)]).flatten().tolist() for _ in range(6)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert {value for epoch in epochs for value in epoch} == set(range(10))


def test_auxiliary_logits_are_passed_to_the_loss_and_left_out_of_the_accuracy() -> None:
    class WithAuxiliary(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = models.TwoLayerNet(64, 16)

        def forward(self, x: Tensor) -> Any:
            logits = self.network(x)
            return (logits, -logits) if self.training else logits

    def loss(output: Any, labels: Tensor) -> Tensor:
        return cross_entropy(output[0] if isinstance(output, tuple) else output, labels)

    run = problems.fit(problem(WithAuxiliary, loss), 3, 1e-2, 0.0)
    assert run.validation_accuracy[-1] > 0.8 and run.train_accuracy[-1] > 0.8


def test_a_verdict_says_in_a_line_what_it_found() -> None:
    assert str(Verdict(3, "Find", True, "Found.")) == "3. Find: passed. Found."
    assert str(Verdict(3, "Find", False, "Not found.")) == "3. Find: FAILED. Not found."


# ---- Bad input -------------------------------------------------------------------------------------------------------

IMAGES, LABELS = torch.zeros(8, 1, 8, 8), torch.arange(8) % 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": (IMAGES, 0 * LABELS)}, r"train must have at least two classes, got only \[0\]"),
        ({"batch_size": 1}, "batch_size must be between 2 and the 8 training examples, got 1"),
        ({"batch_size": 9}, "batch_size must be between 2 and the 8 training examples, got 9"),
        (
            {"train": (IMAGES[:3], LABELS)},
            "train must be images and as many int64 labels, got 3 images and torch.int64",
        ),
        ({"validation": (IMAGES[:0], LABELS[:0])}, "validation must be images and as many int64 labels, got 0 images"),
        ({"train": (IMAGES, LABELS.float())}, r"train must be .* int64 labels, got 8 images and torch.float32 \[8\]"),
        ({"validation": (IMAGES / 0, LABELS)}, "validation must have finite images, got 512 values that are not"),
        ({"num_classes": 1}, r"train must have labels in \[0, 1\), got 0 to 1"),
    ],
)
def test_examples_that_nothing_can_be_learnt_from_are_refused(arguments: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {
        "train": (IMAGES, LABELS),
        "validation": (IMAGES, LABELS),
        "num_classes": 2,
        "batch_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        Problem(lenet, cross_entropy, **{**usual, **arguments})


@pytest.mark.parametrize("step", [seven_steps.overfit_few_batches, seven_steps.find_learning_rate])
@pytest.mark.parametrize("rates", [(), (0.0,), (1e-3, math.inf)])
def test_learning_rates_that_are_none_are_refused(step: Callable[..., Verdict], rates: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="learning_rates must be positive, and one at least, got"):
        step(problem(), learning_rates=rates)
