"""DINO: loss as written out, centre, sharpening, what gradients reach, collapse, and what is learnt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dlkernels import nn, ssl

from .cases.self_supervision import (
    FEATURES,
    Constant,
    Outputs,
    conv_encoder,
    digits,
    linear_encoder,
    pretrain,
    probe,
    warped,
)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


class Views:
    """Views that differ, and are kept: the first is as it is, each further one noisier."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images + 0.3 * len(self.seen))
        return self.seen[-1]


def small(local_views: int = 0, **arguments: float) -> ssl.DINO:
    views = Views()
    model = ssl.DINO(
        linear_encoder(6), ssl.DINOHead(6, 9, 8, 5), views, views if local_views else None, local_views, **arguments
    ).double()
    with torch.no_grad():  # so that the teacher is another one
        for parameter in student(model).parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    torch.nn.init.normal_(model.center)
    return model


def student(model: ssl.DINO) -> torch.nn.Sequential:
    return torch.nn.Sequential(model.encoder, model.head)


def teacher(model: ssl.DINO) -> torch.nn.Sequential:
    return torch.nn.Sequential(model.teacher_encoder, model.teacher_head)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("local_views", [0, 1, 3])
def test_the_loss_is_the_mean_over_all_pairs_of_views(local_views: int) -> None:
    model = small(local_views, student_temperature=0.2, teacher_temperature=0.05)
    loss = model.loss(images())
    views = model.global_view.seen
    assert len(views) == 2 + local_views
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for t in range(2):
        target = ((teacher(model)(views[t]) - model.center) / 0.05).exp()
        target = (target / target.sum(1, keepdim=True)).detach()
        for s, view in enumerate(views):
            if s != t:
                total = total - (target * (student(model)(view) / 0.2).log_softmax(1)).sum(1).mean()
                pairs += 1
    torch.testing.assert_close(loss, total / pairs)
    parameters = list(student(model).parameters())
    gradients, written_out = (torch.autograd.grad(x, parameters) for x in (loss, total / pairs))
    for actual, expected in zip(gradients, written_out, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_logits_are_cosines_with_learnt_directions() -> None:
    head = ssl.DINOHead(6, 9, 8, 5)
    x = torch.randn(4, 6)
    expected = normalize(head.mlp(x), dim=1) @ normalize(head.directions, dim=1).T
    torch.testing.assert_close(head(x), expected)
    assert head(x).abs().max() <= 1 + 1e-6


def test_no_gradient_reaches_the_teacher_or_its_centre() -> None:
    model = small(1)
    model.loss(images()).backward()
    assert all(parameter.grad is not None for parameter in student(model).parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher(model).parameters())
    assert not model.center.requires_grad
    assert not any(target.requires_grad for target in model.targets(images().requires_grad_()))


def test_the_centre_is_an_exact_moving_average_of_the_mean() -> None:
    """Over both global views, over batches between two updates, and not of batches in evaluation."""
    model = small(momentum=1.0, center_momentum=0.75)
    expected = model.center.clone()
    for batches in ((5,), (4,), (3, 3)):
        before = len(model.global_view.seen)
        for count in batches:
            model.loss(images(count))
        seen = torch.cat(model.global_view.seen[before:])
        with torch.no_grad():
            model.eval().loss(images())
            expected = 0.75 * expected + 0.25 * teacher(model)(seen).mean(0)
        model.train().update()
        torch.testing.assert_close(model.center, expected)


def test_the_momentum_rises_from_the_first_to_one_on_half_a_cosine() -> None:
    model = small(steps=4, momentum=0.6)
    for step in range(6):
        momentum = 1 - 0.4 * (math.cos(math.pi * min(step, 4) / 4) + 1) / 2
        expected = [
            momentum * old + (1 - momentum) * new
            for old, new in zip(teacher(model).parameters(), student(model).parameters(), strict=True)
        ]
        model.update()
        for actual, other in zip(teacher(model).parameters(), expected, strict=True):
            torch.testing.assert_close(actual, other, rtol=1e-14, atol=1e-14)
    assert int(model.step) == 6


def test_a_lower_temperature_sharpens_and_the_centre_evens_out() -> None:
    model = small()
    x = images(50) + 2  # which have much in common

    def entropy(probabilities: Tensor) -> float:
        return -(probabilities * probabilities.log()).sum(-1).mean().item()

    sharp, soft = [], []
    for temperature, found in ((0.05, sharp), (0.2, soft)):
        model.teacher_temperature = temperature
        model.center.zero_()
        found.append(model.targets(x)[0])
        model.center.copy_(teacher(model)(x).mean(0))
        found.append(model.targets(x)[0])
    assert entropy(sharp[0]) < entropy(soft[0])
    for uncentred, centred in (sharp, soft):
        assert entropy(centred.mean(0)) > entropy(uncentred.mean(0))


def test_collapse_onto_all_outputs_alike_costs_the_logarithm_of_their_number() -> None:
    model = small()
    torch.nn.init.zeros_(model.head.directions)
    assert model.loss(images()).item() == pytest.approx(math.log(9))


def test_collapse_onto_one_output_is_undone_by_the_centre() -> None:
    model = ssl.DINO(Constant(6), ssl.DINOHead(6, 9, 8, 5), torch.nn.Identity(), center_momentum=0.0)
    x = torch.randn(4, 1)
    assert model.targets(x)[0].max() > 0.5
    model.update()
    torch.testing.assert_close(model.targets(x)[0], torch.full((4, 9), 1 / 9))


def test_the_logits_of_the_student_are_never_in_memory() -> None:
    outputs_count, rows = 2000, 50
    model = ssl.DINO(linear_encoder(6), ssl.DINOHead(6, outputs_count, 8, 5), torch.nn.Identity())
    targets = model.targets(torch.randn(rows, 1, 3, 4))
    with Outputs() as outputs:
        model.student_loss(torch.randn(rows, 1, 3, 4), targets[0]).backward()
    assert outputs.blocks(rows * outputs_count) == 0


def test_features_are_the_teachers() -> None:
    model = small()
    x = images()
    assert torch.equal(model(x), model.teacher_encoder(x))


def test_what_does_not_fit_is_refused() -> None:
    for arguments, message in (
        ({"local_views": 2}, "local_view must be given to make 2 local views"),
        ({"momentum": 1.1}, "momentum must be between 0 and 1, got 1.1"),
        ({"center_momentum": -0.1}, "momentum must be between 0 and 1, got -0.1"),
        ({"teacher_temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"steps": 0}, "steps must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ssl.DINO(linear_encoder(6), ssl.DINOHead(6, 9, 8, 5), torch.nn.Identity(), **arguments)


def crops(images: Tensor) -> Tensor:
    """6 x 6 of the 8 x 8 pixels of warped images: local views, smaller than the global ones."""
    top, left = torch.randint(3, (2, len(images)))
    return ssl.pretext.squares(warped(images), top, left, 6)


def test_a_probe_of_what_was_learnt_beats_a_random_encoder() -> None:
    encoder = conv_encoder().append(nn.BatchNorm1d(FEATURES))
    before = probe(encoder)
    model = ssl.DINO(encoder, ssl.DINOHead(FEATURES, 256, 256, 64), warped, crops, 1, steps=6 * 22, momentum=0.99)
    pretrain(model.loss, student(model).parameters(), 6, 2e-3, 64, model.update)
    assert probe(model) >= before + 0.02
    (targets,) = model.eval().targets(digits().test_images)
    assert targets.mean(0).max() < 0.5  # not one output for all
    assert targets.amax(1).mean() > 0.3  # nor all outputs for each
