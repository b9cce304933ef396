"""What lectures 6 to 8 say of training: first weights, batch norm, optimisers, schedules, what is switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import data, models, nn, train
from dlkernels.train import OPTIMIZERS, SCHEDULES, Settings, Trainer
from dlkernels.train.optimizers import Schedule, make_optimizer

from .cases.learning import accuracy
from .cases.training import load_once

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def one_thread(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """So small a network gains nothing from more; runs share their data."""
    torch.set_num_threads(1)
    monkeypatch.setattr(data, "load", load_once)


def prepared(network: str, arguments: dict[str, Any] | None = None, **settings: Any) -> Trainer:
    return train.prepare(train.recipe(network, "digits", settings=settings, arguments=arguments or {}))


# ---- First weights and batch norm ------------------------------------------------------------------------------------


def lecun(weight: Tensor) -> None:
    torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")


def kaiming(weight: Tensor) -> None:
    torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")


def small(weight: Tensor) -> None:
    torch.nn.init.normal_(weight, std=0.01)


def deep_network(
    activation: Callable[[], torch.nn.Module], initialise: Callable[[Tensor], None], norm: bool, width: int = 256
) -> models.MLP:
    """Ten hidden layers."""
    model = models.MLP(width, (width,) * 10, 10, activation, nn.BatchNorm1d if norm else None)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            initialise(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize(
    ("activation", "initialise", "norm", "signal", "gradient"),
    [
        # What is left at the tenth layer of the first one's signal, and at the first of the tenth one's gradient.
        (torch.nn.ReLU, kaiming, False, (0.5, 2), (0.5, 2)),
        (torch.nn.ReLU, lecun, False, (0.02, 0.1), (0.02, 0.1)),  # half the variance in each layer: 2 ** -4.5 is 0.044
        (torch.nn.ReLU, small, False, (0, 1e-7), (0, 1e-7)),
        (torch.nn.ReLU, small, True, (0.7, 1.4), (0.5, 20)),
        (torch.nn.Tanh, lecun, False, (0.3, 0.8), (0.1, 1)),
        (torch.nn.Tanh, small, False, (0, 1e-6), (0, 1e-6)),
        (torch.nn.Tanh, small, True, (0.9, 1.1), (0.3, 20)),
        (torch.nn.SELU, lecun, False, (0.8, 1.2), (0.5, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_signals_and_gradients_pass_ten_layers_with_the_right_first_weights_or_batch_norm(
    activation: Callable[[], torch.nn.Module],
    initialise: Callable[[Tensor], None],
    norm: bool,
    signal: tuple[float, float],
    gradient: tuple[float, float],
) -> None:
    model, x = deep_network(activation, initialise, norm), torch.randn(200, 256)
    layers = []
    for module in model.hidden:
        x = module(x)
        if isinstance(module, activation):  # type: ignore[arg-type]
            x.retain_grad()
            layers.append(x)
    first, last = layers[0], layers[-1]
    last.backward(torch.randn_like(last))
    assert first.grad is not None and last.grad is not None and len(layers) == 10
    assert signal[0] <= (last.std() / first.std()).item() <= signal[1]
    assert gradient[0] <= (first.grad.std() / last.grad.std()).item() <= gradient[1]


def test_batch_norm_rescues_first_weights_that_nothing_passes() -> None:
    digits, criterion, found = data.load_digits(0), nn.CrossEntropyLoss(), []
    for norm in (False, True):
        torch.manual_seed(0)
        model = deep_network(torch.nn.ReLU, small, norm, width=64)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
        for _ in range(150):
            chosen = torch.randint(len(digits.train_labels), (64,))
            optimizer.zero_grad()
            criterion(model(digits.train_images[chosen]), digits.train_labels[chosen]).backward()
            optimizer.step()
        found.append(accuracy(model, digits.test_images, digits.test_labels))
    assert found[0] <= 0.2
    assert found[1] >= 0.8


# ---- Optimisers ------------------------------------------------------------------------------------------------------

RATES = {
    "sgd": 0.1,
    "momentum": 0.03,
    "nesterov": 0.03,
    "adagrad": 0.01,
    "rmsprop": 1e-3,
    "adam": 3e-3,
    "adamw": 3e-3,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_network_learns_the_digits_with_every_optimiser(name: str) -> None:
    trainer = prepared("mlp", epochs=4, optimizer=name, learning_rate=RATES[name], weight_decay=1e-3)
    first, *_, last = trainer.run()
    assert last.validation["loss"] < 0.5 * first.losses["loss"]
    assert trainer.finish()["accuracy"] >= 0.9


def left_of_one(name: str, gradient: float, steps: int = 500, rate: float = 1e-3, decay: float = 0.1) -> float:
    """The mean of weights that start at one and get noise for a gradient."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.ones(2000, 1))
    optimizer = make_optimizer([weights], Settings(optimizer=name, learning_rate=rate, weight_decay=decay))
    for _ in range(steps):
        weights.grad = gradient * torch.randn_like(weights)
        optimizer.step()
    return weights.mean().item()


def test_decoupled_decay_shrinks_all_weights_alike_and_a_penalty_in_adam_those_with_large_gradients_least() -> None:
    expected = (1 - 1e-3 * 0.1) ** 500
    assert [left_of_one("adamw", gradient) for gradient in (0.01, 1.0, 100.0)] == pytest.approx(
        [expected] * 3, abs=2e-3
    )
    small, middle, large = (left_of_one("adam", gradient) for gradient in (0.01, 1.0, 100.0))
    assert small < 0.6
    assert small < middle - 0.1 < large - 0.1
    assert large == pytest.approx(1.0, abs=2e-3)


# ---- Schedules -------------------------------------------------------------------------------------------------------

STEPS = 120


def torchs(name: str, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Torch's schedule of the same shape."""
    lr = torch.optim.lr_scheduler
    if name == "plateau":
        return lr.ReduceLROnPlateau(optimizer, factor=0.1, patience=Schedule.PATIENCE - 1, threshold=0)
    if name == "inverse_sqrt":
        return lr.LambdaLR(optimizer, lambda step: (step + 1) ** -0.5)
    makers = {
        "constant": lambda: lr.ConstantLR(optimizer, 1.0),
        "step": lambda: lr.StepLR(optimizer, STEPS // 3, 0.1),
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, STEPS),
        "linear": lambda: lr.PolynomialLR(optimizer, STEPS, power=1.0),
    }
    return makers[name]()


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_torchs_of_the_same_shape(name: str) -> None:
    losses = [1.0, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3, 0.3]  # one for ten steps
    schedule, optimizer = Schedule(name, STEPS, 0.0), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    theirs: Any = torchs(name, optimizer)
    for step in range(STEPS):
        assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        if name != "plateau":
            theirs.step()
        if (step + 1) % 10 == 0:
            schedule.observe(losses[step // 10])
            if name == "plateau":
                theirs.step(losses[step // 10])
    assert (schedule.factor(STEPS - 1) < 1) == (name != "constant")


def test_a_batch_four_times_as_large_learns_as_fast_at_four_times_the_rate() -> None:
    settings = {"epochs": 4, "optimizer": "sgd", "learning_rate": 0.05, "schedule": "constant"}
    changes: list[dict[str, int]] = [{"batch_size": 32}, {"batch_size": 128}, {"batch_size": 128, "scale_rate": 32}]
    found = []
    for change in changes:
        *_, last = prepared("mlp", label_smoothing=0.0, **settings, **change).run()
        found.append(last.validation["loss"])
    small, large, scaled = found
    assert large > 1.5 * small
    assert scaled == pytest.approx(small, rel=0.25)


# ---- What is switched on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "settings"),
    [
        ("mlp", {"dropout": 0.3}, {}),
        ("mlp", {"drop_connect": 0.3}, {}),
        ("threelayerconvnet", {"batch_norm": True, "fractional_pooling": 0.7}, {}),
        ("lenet", {}, {"mixup": 4.0}),
        ("lenet", {}, {"cutmix": 1.0}),
        ("lenet", {}, {"cutout": 3}),
        ("lenet", {}, {"label_smoothing": 0.2}),
        ("lenet", {}, {"mixup": 0.4, "cutmix": 1.0, "cutout": 2, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_each_regulariser_is_switched_on_by_a_setting_or_an_argument(
    network: str, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    chosen = {"epochs": 4, "optimizer": "adamw", "learning_rate": 3e-3, "label_smoothing": 0.0}
    plain = prepared(network, {name: value for name, value in arguments.items() if name == "batch_norm"}, **chosen)
    trainer = prepared(network, arguments, **{**chosen, **settings})
    torch.manual_seed(0)
    without = next(iter(plain.run())).losses["loss"]
    torch.manual_seed(0)
    first, *_ = trainer.run()
    assert abs(first.losses["loss"] - without) > 1e-3
    figures = trainer.finish()
    assert figures["accuracy"] >= 0.9
    assert trainer.evaluate(trainer.data.test) == figures  # evaluation draws nothing new


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_stochastic_depth_is_switched_on_by_an_argument(probability: float) -> None:
    arguments = {"dropout": 0.0, "num_classes": 10, "stochastic_depth_prob": probability}
    model, x = models.get_model("efficientnet_b0", **arguments).train(), torch.randn(4, 3, 32, 32)
    first, second = model(x), model(x)
    assert torch.allclose(first, second) == (probability == 0)
