"""Training: networks of every kind learn, repeat themselves, agree between backends, and account for their time."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlkernels import data, models, nn, train
from dlkernels.data import END, PADDING, START
from dlkernels.models import registry
from dlkernels.train import OPTIMIZERS, SCHEDULES, Progress, Settings, Trainer, TrainingError, augment
from dlkernels.train.optimizers import Schedule, make_optimizer
from dlkernels.train.tasks import Augmentation, Captioning, task_of

from .cases.training import BUILDERS, load_once

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small a network gains nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks of ``cases/training.py`` can be named; runs share their data."""
    monkeypatch.setattr(data, "load", load_once)
    for name, builder in BUILDERS.items():
        monkeypatch.setitem(registry._builders, name, builder)


def prepared(
    network: str, source: str | None = None, *, options: dict[str, Any] | None = None, **settings: Any
) -> Trainer:
    return train.prepare(train.recipe(network, source, settings=settings, **(options or {})))


def small(*, options: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    """A small classifier on small images, without batch norm or dropout."""
    options = {"image_size": 4, **(options or {})}
    return prepared("tinyclassifier", "synthetic", options=options, **{"batch_size": 60, "epochs": 2, **settings})


def take(trainer: Trainer, steps: int) -> list[Progress]:
    """The first steps."""
    return list(itertools.islice(trainer.run(), steps))


def losses(trainer: Trainer, steps: int) -> list[float]:
    return [progress.losses["loss"] for progress in take(trainer, steps)]


# Networks of every kind


def test_lenet_learns_the_digits() -> None:
    trainer = prepared("lenet")
    *_, last = trainer.run()
    assert last.step == 20 * (1294 // 32)
    assert last.validation["accuracy"] >= 0.97
    figures = trainer.finish()
    assert figures["accuracy"] >= 0.98
    # The figure is what anybody finds who tries the network on the test images.
    images, labels = trainer.data.batch(trainer.data.test, torch.arange(359))
    assert (trainer.model.eval()(images).argmax(1) == labels).float().mean().item() == pytest.approx(
        figures["accuracy"]
    )


@pytest.mark.parametrize(
    ("network", "source", "options", "settings", "figure"),
    [
        ("tinyclassifier", "digits", {}, {"epochs": 3}, ("accuracy", 0.9)),
        ("tiny_colour_net", "synthetic", {"image_size": 8}, {"epochs": 4}, ("loss", 1.9)),
        ("tinylanguagemodel", "text", {"length": 32}, {"epochs": 1}, ("perplexity", 20)),
        ("tinytranslator", "synthetic", {}, {"epochs": 4, "learning_rate": 1e-2}, ("loss", 3.0)),
        ("tinycaptioner", "synthetic", {"image_size": 8}, {"epochs": 4, "learning_rate": 1e-2}, ("perplexity", 2.5)),
        ("tinyanswerer", "synthetic", {"image_size": 8}, {"epochs": 8, "learning_rate": 1e-2}, ("accuracy", 0.55)),
        ("tinyautoencoder", "digits", {}, {"epochs": 6}, ("loss", 0.45)),
    ],
)
def test_every_kind_of_network_learns(
    network: str, source: str, options: dict[str, Any], settings: dict[str, Any], figure: tuple[str, float]
) -> None:
    trainer = prepared(network, source, options=options, **settings)
    first, *_, last = trainer.run()
    assert last.losses["loss"] < first.losses["loss"]
    name, bound = figure
    value = trainer.finish()[name]
    assert value > bound if name == "accuracy" else value < bound


def test_a_gan_moves_one_player_at_a_time() -> None:
    trainer = prepared("tinygan", optimizer="sgd", learning_rate=0.1)
    model: Any = trainer.model
    seen: list[tuple[str, set[str]]] = []
    for turn in trainer.turns:
        step = turn.optimizer.step

        def record(name: str = turn.name, step: Callable[[], Any] = step) -> None:
            seen.append((name, {key for key, p in model.named_parameters() if p.grad is not None}))
            step()

        turn.optimizer.step = record  # type: ignore[method-assign]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (progress,) = take(trainer, 1)
    assert set(progress.losses) == {"discriminator", "generator"}
    own = {player: {f"{player}.weight", f"{player}.bias"} for player in ("discriminator", "generator")}
    assert seen[0] == ("discriminator", own["discriminator"])
    assert seen[1] == ("generator", own["discriminator"] | own["generator"])  # those of the discriminator are left over
    assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert set(trainer.evaluate(trainer.data.validation)) == {"discriminator", "generator"}


def test_the_discriminator_is_not_moved_by_the_generators_loss() -> None:
    trainer = prepared("tinygan", optimizer="sgd", learning_rate=0.1)
    discriminator, generator = trainer.turns
    parts = trainer._parts(torch.arange(32))
    trainer._gradients(discriminator, parts)
    gradient = discriminator.parameters[0].grad
    assert gradient is not None
    before = gradient.clone()
    trainer._gradients(generator, parts)
    assert torch.equal(gradient, before)


def test_half_way_classifiers_count_three_tenths() -> None:
    trainer = prepared(
        "tiny_colour_net",
        options={"arguments": {"auxiliary": True}, "image_size": 8},
        label_smoothing=0.0,
        batch_size=8,
    )
    images, labels = trainer._batch(trainer.data.train, torch.arange(8))
    main, *others = trainer.model.train()(images)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = cross_entropy(main, labels) + 0.3 * sum(cross_entropy(other, labels) for other in others)
    torch.testing.assert_close(trainer.turns[0].objective(images, labels), expected)


def test_grey_images_are_made_colour_for_networks_of_photographs() -> None:
    trainer = prepared("tiny_colour_net", "digits")
    images, _ = trainer._batch(trainer.data.train, torch.arange(3))
    assert images.shape == (3, 3, 8, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_padding_is_neither_counted_nor_predicted() -> None:
    captions = torch.tensor([[START, 7, 8, END], [START, END, PADDING, PADDING]])
    assert Captioning().count((torch.zeros(2), captions), torch.tensor([0, 1])) == 4
    assert Captioning().count((torch.zeros(2), captions), torch.tensor([1])) == 1


def test_a_loss_of_unknown_parameters_is_named() -> None:
    class Odd(torch.nn.Module):
        def loss(self, sounds: Tensor) -> Tensor:
            return sounds

    with pytest.raises(
        ValueError, match=r"Odd.loss takes \(sounds\), expected \(tokens, targets\) or \(source, target\)"
    ):
        task_of(Odd)


def test_every_network_has_a_task() -> None:
    for name in models.list_models():
        assert train.task_for(name).settings.epochs >= 1


# Numbers


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "nesterov", "learning_rate": 0.05},
        {"optimizer": "adamw", "learning_rate": 1e-3},
        {"mixup": 0.4, "cutout": 3},
        {"cutmix": 1.0},
    ],
    ids=str,
)
def test_loss_curves_agree_with_torch(settings: dict[str, Any]) -> None:
    ours = losses(prepared("lenet", **settings), 50)
    peer = losses(prepared("lenet", options={"backend": "torch"}, **settings), 50)
    assert len(ours) == 50
    assert max(abs(a - b) for a, b in zip(ours, peer, strict=True)) <= 1e-3
    assert ours[-1] < 0.9 * ours[0]


def test_the_seed_decides_every_number() -> None:
    options = {"arguments": {"dropout": 0.2, "noise": 0.1}}
    first, second = (losses(small(options=options), 10) for _ in range(2))
    other = losses(small(options=options, seed=1), 10)
    assert first == second
    assert first != other


def test_the_number_of_threads_changes_nothing() -> None:
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(losses(prepared("lenet"), 2))
    assert found[0] == found[1]


def test_backends_start_from_the_same_weights() -> None:
    ours, peer = (prepared("lenet", options={"backend": backend}, seed=3).model for backend in train.BACKENDS)
    peer.load_state_dict(ours.state_dict(), strict=True)
    for (name, a), b in zip(ours.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_backends_use_their_own_modules() -> None:
    ours, peer = (prepared("lenet", options={"backend": backend}) for backend in train.BACKENDS)
    assert sum(isinstance(module, nn.Conv2d | nn.BatchNorm2d) for module in ours.model.modules()) == 4
    assert not any(type(module).__module__.startswith("dlkernels.nn") for module in peer.model.modules())
    calls = {entry.name: entry.on_dlkernels for entry in train.operation_times(train.some_steps(peer, 1))}
    assert calls["cross_entropy"] == 0


def test_an_epoch_meets_every_example_at_most_once_in_an_order_of_its_own() -> None:
    trainer = small(batch_size=70)
    orders = [trainer._order(epoch) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(1800)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    met = []
    parts = trainer._parts
    trainer._parts = lambda rows: (met.append(rows), parts(rows))[1]  # type: ignore[method-assign,func-returns-value]
    list(trainer.run())
    assert torch.equal(torch.cat(met), torch.cat([order[:1750] for order in orders[:2]]))


@pytest.mark.parametrize(
    ("network", "options"),
    [
        ("tinyclassifier", {"image_size": 4}),
        ("tinycaptioner", {"image_size": 8}),  # parts have different numbers of words
        ("tinytranslator", {}),
        ("tinygan", {"image_size": 4, "arguments": {"noise": 0.0}}),
    ],
)
def test_accumulation_gives_the_numbers_of_the_whole_batch(network: str, options: dict[str, Any]) -> None:
    found = []
    for parts in (1, 5):
        trainer = prepared(network, "synthetic", options=options, batch_size=60, accumulate=parts)
        trainer.model.double()
        trainer._batch = as_double(trainer._batch)  # type: ignore[method-assign]
        found.append(([p.losses for p in take(trainer, 6)], trainer.model.state_dict()))
    (whole, weights), (accumulated, other_weights) = found
    for a, b in zip(whole, accumulated, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], rtol=1e-9, atol=1e-12)


def as_double(batch: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *arguments: tuple(c.double() if c.is_floating_point() else c for c in batch(*arguments))


# Optimisers and schedules


def steps_of(name: str, count: int, decay: float = 0.0) -> list[float]:
    """A weight that starts at 1 with the gradients 0.5, 0.25 and so on."""
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    optimizer = make_optimizer([weight], Settings(optimizer=name, learning_rate=0.1, weight_decay=decay))
    found = []
    for step in range(1, count + 1):
        weight.grad = torch.full_like(weight, 0.5**step)
        optimizer.step()
        found.append(weight.item())
    return found


def adam(decay: float, decoupled: bool) -> list[float]:
    w, m, v, found = 1.0, 0.0, 0.0, []
    for step, gradient in enumerate((0.5, 0.25), 1):
        if decoupled:
            w -= 0.1 * decay * w
        else:
            gradient += decay * w
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        found.append(w)
    return found


@pytest.mark.parametrize(
    ("name", "decay", "expected"),
    [
        ("sgd", 0.0, [1 - 0.05, 1 - 0.05 - 0.025]),
        ("sgd", 0.1, [1 - 0.1 * 0.6, 0.94 - 0.1 * (0.25 + 0.094)]),
        ("momentum", 0.0, [1 - 0.05, 1 - 0.05 - 0.1 * (0.25 + 0.9 * 0.5)]),
        ("nesterov", 0.0, [1 - 0.1 * (0.5 + 0.9 * 0.5), 0.905 - 0.1 * (0.25 + 0.9 * (0.25 + 0.9 * 0.5))]),
        ("adagrad", 0.0, [1 - 0.1, 0.9 - 0.1 * 0.25 / math.sqrt(0.25 + 0.0625)]),
        ("rmsprop", 0.0, [1 - 0.1 * 0.5 / math.sqrt(0.0025), 0 - 0.1 * 0.25 / math.sqrt(0.99 * 0.0025 + 0.000625)]),
        ("adam", 0.2, adam(0.2, decoupled=False)),
        ("adamw", 0.2, adam(0.2, decoupled=True)),
    ],
)
def test_optimisers_take_the_steps_of_their_formulas(name: str, decay: float, expected: list[float]) -> None:
    assert steps_of(name, 2, decay) == pytest.approx(expected, abs=1e-6)


def test_decay_is_part_of_the_gradient_but_for_adamw() -> None:
    assert steps_of("adam", 2, 0.2) != pytest.approx(steps_of("adamw", 2, 0.2), abs=1e-3)


def test_only_matrices_and_filters_decay() -> None:
    model = models.LeNet(8)
    for name in OPTIMIZERS:
        decayed, others = make_optimizer(model.parameters(), Settings(optimizer=name, weight_decay=0.01)).param_groups
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
        assert all(parameter.dim() > 1 for parameter in decayed["params"])
        assert all(parameter.dim() <= 1 for parameter in others["params"])
        assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_rises_in_its_warm_up(name: str) -> None:
    warm, cold = Schedule(name, 100, 0.1), Schedule(name, 100, 0.0)
    assert [warm.factor(step) for step in range(10)] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert warm.factor(10) == pytest.approx(1.0, abs=0.05)
    assert cold.factor(0) == pytest.approx(1.0)
    rest = [warm.factor(step) for step in range(10, 100)]
    assert rest == sorted(rest, reverse=True)
    assert 0 < rest[-1] <= 1


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        ("constant", 99, 1.0),
        ("step", 33, 1.0),
        ("step", 34, 0.1),
        ("step", 67, 0.01),
        ("cosine", 55, 0.5),
        ("cosine", 99, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
        ("linear", 55, 0.5),
        ("linear", 99, 1 / 90),
        ("inverse_sqrt", 39, 0.5),
        ("plateau", 99, 1.0),
    ],
)
def test_schedules_follow_their_formulas(name: str, step: int, expected: float) -> None:
    assert Schedule(name, 100, 0.1).factor(step) == pytest.approx(expected)


def test_plateau_divides_by_ten_where_the_loss_no_longer_falls() -> None:
    schedule = Schedule("plateau", 100, 0.0)
    factors = []
    for loss in (1.0, 0.9, 0.95, 0.9, math.nan, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9):
        schedule.observe(loss)
        factors.append(schedule.factor(50))
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001])


def test_the_schedule_reaches_the_optimiser() -> None:
    trainer = small(schedule="linear", warmup=0.2, learning_rate=0.3, optimizer="adam")
    rates = []
    for progress in trainer.run():
        assert {group["lr"] for group in trainer.turns[0].optimizer.param_groups} == {progress.learning_rate}
        rates.append(progress.learning_rate)
    assert rates == pytest.approx([0.3 * Schedule("linear", 60, 0.2).factor(step) for step in range(60)])


@pytest.mark.parametrize(("base", "peak"), [(None, 0.3), (60, 0.3), (15, 1.2), (120, 0.15)])
def test_the_rate_is_scaled_with_the_batch(base: int | None, peak: float) -> None:
    trainer = small(scale_rate=base, learning_rate=0.3, schedule="constant", warmup=0.1)
    rates = [progress.learning_rate for progress in take(trainer, 7)]
    assert rates == pytest.approx([peak * min(1, step / 6) for step in range(1, 8)])


# Augmentation

AUGMENTATIONS: dict[str, tuple[float, Augmentation]] = {
    "mixup": (0.4, augment.Mixup(12, 0.4)),
    "cutmix": (1.0, augment.CutMix(12, 1.0)),
    "cutout": (2, augment.Cutout(2)),
}
TWELVE_CLASSES = {"arguments": {"num_classes": 12}}  # more than the data has


def some_examples(trainer: Trainer) -> tuple[Tensor, Tensor]:
    images, labels = trainer._batch(trainer.data.train, torch.arange(60))
    return images, labels


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_changes_the_training_loss_as_its_class_does(name: str) -> None:
    value, change = AUGMENTATIONS[name]
    trainer = small(label_smoothing=0.2, options=TWELVE_CLASSES, **{name: value})
    images, labels = some_examples(trainer)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.2)
    plain, differences = cross_entropy(trainer.model(images), labels), []
    for seed in range(5):
        torch.manual_seed(seed)
        loss = trainer.turns[0].objective(images, labels)
        torch.manual_seed(seed)
        changed, targets = change(images, labels)
        torch.testing.assert_close(loss, cross_entropy(trainer.model(changed), targets))
        differences.append((loss - plain).abs().item())
    assert max(differences) > 0.01
    figures = trainer.task.figures(trainer.model, images, labels)
    assert figures["loss"].item() == pytest.approx(
        torch.nn.functional.cross_entropy(trainer.model(images), labels).item()
    )


def test_holes_come_first_and_each_batch_draws_one_of_mixup_and_cutmix() -> None:
    trainer = small(label_smoothing=0.0, options=TWELVE_CLASSES, **{name: v for name, (v, _) in AUGMENTATIONS.items()})
    images, labels = some_examples(trainer)
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        loss = trainer.turns[0].objective(images, labels)
        torch.manual_seed(seed)
        changed, targets = AUGMENTATIONS["cutout"][1](images, labels)
        name = ("mixup", "cutmix")[torch.randint(2, ())]
        changed, targets = AUGMENTATIONS[name][1](changed, targets)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(trainer.model(changed), targets))
        drawn.add(name)
    assert drawn == {"mixup", "cutmix"}


def test_half_way_classifiers_learn_mixed_labels_too() -> None:
    options = {"arguments": {"auxiliary": True, "num_classes": 12}, "image_size": 8}
    trainer = prepared("tiny_colour_net", options=options, label_smoothing=0.0, mixup=0.4)
    images, labels = some_examples(trainer)
    torch.manual_seed(0)
    loss = trainer.turns[0].objective(images, labels)
    torch.manual_seed(0)
    mixed, shares = AUGMENTATIONS["mixup"][1](images, labels)
    main, *others = (torch.nn.functional.cross_entropy(logits, shares) for logits in trainer.model.train()(mixed))
    torch.testing.assert_close(loss, main + 0.3 * sum(others))


# Features of the loop


def test_gradients_are_shortened_to_the_norm() -> None:
    trainer = small(optimizer="sgd", learning_rate=1.0, warmup=0.0, weight_decay=0.0, clip_norm=0.01)
    before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    take(trainer, 1)
    after = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_moving_average_is_evaluated_and_stays() -> None:
    trainer = small(ema=0.9, options={"arguments": {"norm": True}})
    average: dict[str, Tensor] = {}
    for progress in trainer.run():
        for name, tensor in trainer.model.state_dict().items():
            if tensor.is_floating_point():
                average[name] = 0.9 * average[name] + 0.1 * tensor if name in average else tensor.clone()
        if progress.validation:
            peer = small(options={"arguments": {"norm": True}})
            peer.model.load_state_dict(average, strict=False)
            assert peer.evaluate(peer.data.validation) == pytest.approx(progress.validation, rel=1e-4)
    assert not torch.allclose(average["hidden.weight"], trainer.model.get_parameter("hidden.weight"))
    trainer.finish()
    for name, tensor in average.items():
        torch.testing.assert_close(trainer.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_early_stopping_restores_the_best_weights() -> None:
    trainer = small(epochs=60, patience=2, learning_rate=2.0, optimizer="momentum", warmup=0.0, schedule="constant")
    found: list[tuple[float, dict[str, Tensor]]] = []
    for progress in trainer.run():
        if progress.validation:
            weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
            found.append((progress.validation["loss"], weights))
    validation = [loss for loss, _ in found]
    best = int(np.argmin(validation))
    assert len(found) < 60
    assert len(found) == best + 1 + 2
    assert trainer.best_step == (best + 1) * trainer.steps_per_epoch
    trainer.finish()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, found[best][1][name])
        assert not torch.equal(tensor, found[-1][1][name])
    assert trainer.evaluate(trainer.data.validation)["loss"] == validation[best]


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.4}], ids=str)
def test_amp_computes_in_bfloat16(settings: dict[str, Any]) -> None:
    seen = []
    trainer = small(amp=True, **settings)
    trainer.model.hidden.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))  # type: ignore[union-attr]
    mixed = losses(trainer, 10)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    full = losses(small(**settings), 10)
    assert mixed != full
    assert mixed == pytest.approx(full, abs=0.02)
    trainer.evaluate(trainer.data.validation)
    assert set(seen) == {torch.bfloat16}


def test_evaluation_uses_up_no_random_numbers_and_repeats_itself() -> None:
    trainer = small(options={"arguments": {"noise": 0.3, "dropout": 0.3}})
    state = torch.get_rng_state()
    first = trainer.evaluate(trainer.data.validation)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert trainer.evaluate(trainer.data.validation) == first
    assert trainer.model.training


def test_figures_are_means_over_all_examples_however_they_are_batched() -> None:
    few, many = (prepared("tinycaptioner", batch_size=size, options={"image_size": 8}) for size in (30, 128))
    assert few.evaluate(few.data.test) == pytest.approx(many.evaluate(many.data.test), rel=1e-5)
    captions = few.data.test[1]
    loss = few.model.loss(*few._batch(few.data.test, torch.arange(len(captions)))).item()  # type: ignore[operator]
    assert few.evaluate(few.data.test)["loss"] == pytest.approx(loss, rel=1e-5)
    assert few.evaluate(few.data.test)["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 2000}, "the batch size, 2000, is larger than the training set, 1800"),
        ({"batch_size": 10, "accumulate": 4}, "the batch size, 10, is not a multiple of 4: 1 processes times 4"),
        ({"learning_rate": 1e20}, r"the loss became (nan|inf) at step \d+; try a smaller learning rate"),
    ],
)
def test_a_run_that_cannot_be_is_an_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        list(small(**settings).run())


def test_batch_norm_wants_two_examples() -> None:
    with pytest.raises(TrainingError, match="batch norm needs two examples at once, but a batch of 4 has 4 parts"):
        small(batch_size=4, accumulate=4, options={"arguments": {"norm": True}})


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_wants_two_examples(name: str) -> None:
    with pytest.raises(TrainingError, match=f"{name} needs two examples at once, but a batch of 4 has 4 parts"):
        small(batch_size=4, accumulate=4, **{name: 1.0})
    list(itertools.islice(small(batch_size=4, accumulate=2, **{name: 1.0}).run(), 1))
    list(itertools.islice(small(batch_size=4, accumulate=4, cutout=1).run(), 1))


def test_a_gan_is_not_stopped_early() -> None:
    with pytest.raises(TrainingError, match="a GAN has no validation loss to stop early by"):
        prepared("tinygan", patience=3)


@pytest.mark.parametrize(("name", "value"), [("label_smoothing", 0.1), ("mixup", 0.2), ("cutmix", 1.0), ("cutout", 2)])
@pytest.mark.parametrize("network", ["tinyautoencoder", "tinygan", "tinycaptioner"])
def test_what_is_of_classifiers_is_refused_by_other_networks(network: str, name: str, value: float) -> None:
    title = train.task_for(network).title
    with pytest.raises(TrainingError, match=f"{name}={value} is for classifiers, this is {title}; leave {name} out"):
        prepared(network, **{name: value})


def test_a_network_that_does_not_take_the_data_is_named_before_training() -> None:
    with pytest.raises(TrainingError, match=r"tiny_colour_net does not take examples of shape \[3, 2, 2\]"):
        prepared("tiny_colour_net", options={"image_size": 2})
    with pytest.raises(ValueError, match="tinyclassifier: hidden_features must be positive, got 0"):
        small(options={"arguments": {"hidden_features": 0}})
    with pytest.raises(ValueError, match="tinyencoder needs code_features; give it as an argument"):
        prepared("tinyencoder", "digits")
    with pytest.raises(ValueError, match="tiny_colour_net: .*unexpected keyword argument 'depth'"):
        prepared("tiny_colour_net", options={"arguments": {"depth": 3}})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("accumulate", 0, "accumulate must be at least 1, got 0"),
        ("learning_rate", 0.0, "learning_rate must be a positive number, got 0.0"),
        ("learning_rate", math.nan, "learning_rate must be a positive number, got nan"),
        ("momentum", 1.0, r"momentum must be in \[0, 1\), got 1.0"),
        ("weight_decay", -1.0, "weight_decay must be a number that is not negative, got -1.0"),
        ("warmup", 1.5, r"warmup must be in \[0, 1\), got 1.5"),
        ("label_smoothing", -0.1, "label_smoothing must be in"),
        ("mixup", 0.0, "mixup must be a positive number, got 0.0"),
        ("mixup", math.nan, "mixup must be a positive number, got nan"),
        ("cutmix", -1.0, "cutmix must be a positive number, got -1.0"),
        ("cutmix", math.inf, "cutmix must be a positive number, got inf"),
        ("cutout", 0, "cutout must be at least 1, got 0"),
        ("scale_rate", 0, "scale_rate must be at least 1, got 0"),
        ("clip_norm", 0.0, "clip_norm must be a positive number, got 0.0"),
        ("ema", 1.0, r"ema must be in \(0, 1\), got 1.0"),
        ("patience", 0, "patience must be at least 1, got 0"),
        ("seed", -1, "seed must be at least 0, and of 63 bits, got -1"),
        ("seed", 2**63, "seed must be at least 0, and of 63 bits, got 9223372036854775808"),
        ("optimizer", "lion", "optimizer must be one of sgd, momentum, nesterov, .* got 'lion'"),
        ("schedule", "zigzag", "schedule must be one of constant, step, cosine, .* got 'zigzag'"),
    ],
)
def test_settings_outside_their_range_are_named(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**{field: value})  # type: ignore[arg-type]


def test_unknown_networks_and_backends_are_named() -> None:
    with pytest.raises(ValueError, match="backend must be one of dlkernels, torch, got 'numpy'"):
        train.recipe("lenet", backend="numpy")
    with pytest.raises(ValueError, match="no network named 'lenett'; did you mean lenet"):
        train.recipe("lenett")


# LeNet and the digits


@pytest.mark.parametrize(("image_size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_lenet_takes_images_of_several_sizes(image_size: int, channels: int) -> None:
    model = models.LeNet(image_size, in_channels=channels, num_classes=7)
    assert model(torch.randn(2, channels, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("image_size", [0, -4, 2, 30])
def test_lenet_refuses_sizes_that_it_cannot_halve_twice(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size must be a positive multiple of 4, got {image_size}"):
        models.LeNet(image_size)


def test_digits_are_split_without_overlap() -> None:
    split = data.load_digits(seed=5)
    assert split.train_images.shape == (1438, 1, 8, 8)
    assert split.test_images.shape == (359, 1, 8, 8)
    assert split.train_images.mean().abs() < 1e-5
    assert split.train_images.std() == pytest.approx(1.0, abs=1e-5)
    assert set(split.test_labels.tolist()) == set(range(10))
    images = torch.cat([split.train_images, split.test_images]).flatten(1)
    assert images.unique(dim=0).shape[0] == 1797
    # In three parts they are the same: the test part too.
    parts = data.load("digits", seed=5)
    assert torch.equal(parts.test[1], split.test_labels)
    assert [len(part[0]) for part in (parts.train, parts.validation)] == [1294, 144]
    images = torch.cat([part[0] for part in (parts.train, parts.validation, parts.test)]).flatten(1)
    assert images.unique(dim=0).shape[0] == 1797


def test_batches_of_ones_own_loop_meet_every_example_at_most_once() -> None:
    images = torch.arange(10.0).view(10, 1)
    batches = list(data.shuffled_batches(images, torch.arange(10), 3, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [3, 3, 3]
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen.unique()) == 9
    assert torch.equal(torch.cat([x for x, _ in batches]).flatten(), seen.float())


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_digits_refuse_an_empty_part(share: float) -> None:
    with pytest.raises(ValueError, match="test_share must be between 0 and 1"):
        data.load_digits(test_share=share)


# Where the time goes


@pytest.mark.parametrize("backend", ["dlkernels", "torch"])
def test_operation_times_count_calls_and_where_they_ran(backend: str) -> None:
    trainer = prepared("lenet", options={"backend": backend})
    times = train.operation_times(train.some_steps(trainer, steps=3))
    by_name = {entry.name: entry for entry in times}
    assert list(by_name) == ["conv2d", "batch_norm", "linear", "cross_entropy", "everything else"]
    assert all(entry.seconds > 0 for entry in times)
    # Two layers of each and three linear ones, forward and backward, three steps; a loss. torch's loss and linear
    # layers go backward in two operators.
    assert by_name["conv2d"].calls == by_name["batch_norm"].calls == 2 * 2 * 3
    assert by_name["linear"].calls == (3 * 2 * 3 if backend == "dlkernels" else 3 * 3 * 3)
    assert by_name["cross_entropy"].calls == (6 if backend == "dlkernels" else 9)
    for name in ("conv2d", "batch_norm", "linear", "cross_entropy"):
        assert by_name[name].on_dlkernels == (by_name[name].calls if backend == "dlkernels" else 0)


def test_operation_times_do_not_count_what_an_operation_calls() -> None:
    image = torch.randn(1, 1, 8, 8)
    weight = torch.randn(1, 1, 3, 3)

    def program() -> Tensor:
        return torch.nn.functional.conv2d(image, weight)

    conv, rest = train.operation_times(program)
    assert (conv.name, conv.calls, conv.on_dlkernels) == ("conv2d", 1, 0)
    assert (rest.name, rest.calls) == ("everything else", 0)


def test_classification_smooths_labels_in_training_alone() -> None:
    trainer = small(label_smoothing=0.5)
    rows = torch.arange(60)
    batch = trainer._batch(trainer.data.train, rows)
    plain = torch.nn.functional.cross_entropy(trainer.model(batch[0]), batch[1])
    assert trainer.task.figures(trainer.model, *batch)["loss"].item() == pytest.approx(plain.item())
    smooth = torch.nn.functional.cross_entropy(trainer.model(batch[0]), batch[1], label_smoothing=0.5)
    assert trainer.turns[0].objective(*batch).item() == pytest.approx(smooth.item(), rel=1e-5)


def test_settings_of_a_task_hold_but_for_those_that_are_given() -> None:
    recipe = train.recipe("tinygan", settings={"epochs": 2})
    assert recipe.settings == dataclasses.replace(train.task_for("tinygan").settings, epochs=2)
    assert recipe.source == "digits"
