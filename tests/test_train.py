"""Training: the networks learn, repeat themselves, agree between backends, and account for their time."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from dlkernels import data, models, nn, train
from dlkernels.train import Progress, Settings, TrainingError
from dlkernels.train.loop import make_optimizer, schedule

pytest.importorskip("sklearn")

FULL = Settings(epochs=20, batch_size=32, learning_rate=0.05)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small a network gains nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


def first_steps(backend: str, steps: int, settings: Settings = FULL) -> list[Progress]:
    """The first steps of the main job."""
    model, loss_function, split = train.lenet_on_digits(backend, settings.seed)
    return [step for step, _ in zip(train.train(model, loss_function, split, settings), range(steps), strict=False)]


def test_lenet_learns_the_digits() -> None:
    model, loss_function, split = train.lenet_on_digits("dlkernels", seed=0)
    *_, last = train.train(model, loss_function, split, FULL)
    assert last.test_accuracy is not None
    assert last.test_accuracy >= 0.98
    assert last.test_accuracy == train.evaluate(model, split.test_images, split.test_labels)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_loss_curves_agree_with_torch(optimizer: str) -> None:
    rate = 0.05 if optimizer == "sgd" else 1e-3
    settings = dataclasses.replace(FULL, optimizer=optimizer, learning_rate=rate)
    ours = [step.loss for step in first_steps("dlkernels", 50, settings)]
    peer = [step.loss for step in first_steps("torch", 50, settings)]
    assert len(ours) == 50
    assert max(abs(a - b) for a, b in zip(ours, peer, strict=True)) <= 1e-3
    assert ours[-1] < 0.9 * ours[0]


def test_the_seed_decides_every_number() -> None:
    first, second = ([step.loss for step in first_steps("dlkernels", 10)] for _ in range(2))
    other = [step.loss for step in first_steps("dlkernels", 10, dataclasses.replace(FULL, seed=1))]
    assert first == second
    assert first != other


def test_the_number_of_threads_changes_nothing() -> None:
    losses = []
    for count in (1, 3):
        torch.set_num_threads(count)
        losses.append([step.loss for step in first_steps("dlkernels", 2)])
    assert losses[0] == losses[1]


def test_backends_start_from_the_same_weights() -> None:
    ours, _, _ = train.lenet_on_digits("dlkernels", seed=3)
    peer, _, _ = train.lenet_on_digits("torch", seed=3)
    peer.load_state_dict(ours.state_dict(), strict=True)
    for (name, a), b in zip(ours.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_backends_use_their_own_modules() -> None:
    ours, our_loss, _ = train.lenet_on_digits("dlkernels")
    peer, peer_loss, _ = train.lenet_on_digits("torch")
    assert sum(isinstance(module, nn.Conv2d | nn.BatchNorm2d) for module in ours.modules()) == 4
    assert isinstance(our_loss, nn.CrossEntropyLoss)
    assert not any(type(module).__module__.startswith("dlkernels.nn") for module in [*peer.modules(), peer_loss])


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend must be one of dlkernels, torch, got 'numpy'"):
        train.lenet_on_digits("numpy")


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


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, math.nan])
def test_digits_refuse_an_empty_part(share: float) -> None:
    with pytest.raises(ValueError, match="test_share must be between 0 and 1"):
        data.load_digits(test_share=share)


def test_an_epoch_meets_every_example_at_most_once() -> None:
    images = torch.arange(10.0).view(10, 1)
    batches = list(data.shuffled_batches(images, torch.arange(10), 3, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [3, 3, 3]
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen.unique()) == 9
    assert torch.equal(torch.cat([x for x, _ in batches]).flatten(), seen.float())


def test_schedule_rises_and_falls() -> None:
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_only_matrices_and_filters_decay() -> None:
    model = models.LeNet(8)
    decayed, others = make_optimizer(model, FULL).param_groups
    assert others["weight_decay"] == 0.0
    assert decayed["weight_decay"] == FULL.weight_decay
    assert all(parameter.dim() > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="optimizer must be 'sgd' or 'adamw', got 'adagrad'"):
        make_optimizer(models.LeNet(8), dataclasses.replace(FULL, optimizer="adagrad"))


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) at step \d+"):
        first_steps("dlkernels", 200, dataclasses.replace(FULL, learning_rate=1e20))


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(TrainingError, match="the batch size, 2000, is larger than the training set, 1438"):
        first_steps("dlkernels", 1, dataclasses.replace(FULL, batch_size=2000))


@pytest.mark.parametrize("backend", ["dlkernels", "torch"])
def test_operation_times_count_calls_and_where_they_ran(backend: str) -> None:
    model, loss_function, split = train.lenet_on_digits(backend)
    times = train.operation_times(train.some_steps(model, loss_function, split, FULL, steps=3))
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
