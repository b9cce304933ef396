"""Generative adversarial networks: as on torch's layers, their two losses, and digits that a classifier recognises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import data, models

from .cases.learning import accuracy, fit
from .cases.networks import compare_with_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_it_computes_on_torchs_layers(dtype: torch.dtype) -> None:
    images, latent = torch.randn(5, 2, 8, 8, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    compare_with_torch(
        lambda layers: models.GAN(8, 2, 6, (4, 8), layers=layers),
        lambda model: (model(latent), model.generator_loss(4), model.discriminator_loss(images)),
        dtype,
    )


def test_parameter_count() -> None:
    generator = 64 * 128 * 49 + 2 * 128 + (64 * 128 * 9 + 2 * 64) + (64 * 9 + 1)
    discriminator = (64 * 16 + 64) + (128 * 64 * 16 + 2 * 128) + (128 * 49 + 1)
    with torch.device("meta"):
        model = models.get_model("gan")
    assert sum(parameter.numel() for parameter in model.generator.parameters()) == generator
    assert sum(parameter.numel() for parameter in model.discriminator.parameters()) == discriminator


def test_losses_are_the_logarithms_of_the_probabilities() -> None:
    model = models.GAN(8, widths=(4, 8)).double()
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    fake = model.discriminator(model.generator(model.latent(6))).sigmoid()
    real = model.discriminator(images).sigmoid()
    torch.manual_seed(1)
    torch.testing.assert_close(model.generator_loss(6), -fake.log().mean())
    torch.manual_seed(1)
    torch.testing.assert_close(model.discriminator_loss(images), -real.log().mean() - (1 - fake).log().mean())


def test_the_loss_of_the_discriminator_leaves_the_generator_alone() -> None:
    model = models.GAN(8, widths=(4, 8))
    model.discriminator_loss(torch.randn(6, 1, 8, 8)).backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())
    model.generator_loss(6).backward()
    assert all(parameter.grad is not None for parameter in model.generator.parameters())


def test_samples_repeat_with_their_generator_and_change_nothing() -> None:
    model = models.GAN(8, widths=(4, 8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, again, other = (model.sample(5, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == (5, 1, 8, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert model.generator.training
    assert not first.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 4, got 6"):
        models.GAN(6)


def recognised(classifier: torch.nn.Module, images: Tensor) -> tuple[Tensor, float]:
    """How often ``classifier`` sees each class, and how sure it is of it on average."""
    with torch.no_grad():
        probabilities = classifier.eval()(images).softmax(1)
    return probabilities.argmax(1).bincount(minlength=10), probabilities.amax(1).mean().item()


def test_it_draws_every_digit_so_that_a_classifier_of_real_ones_recognises_it() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    classifier = models.LeNet(8)
    fit(
        classifier.parameters(),
        lambda images, labels: F.cross_entropy(classifier(images), labels),
        digits.train_images,
        digits.train_labels,
        epochs=4,
        learning_rate=2e-3,
    )
    assert accuracy(classifier, digits.test_images, digits.test_labels) >= 0.97

    model = models.GAN(8, latent_features=16, widths=(16, 32))
    untrained, _ = recognised(classifier, model.sample(1000))
    steps_of = {
        part: torch.optim.Adam(getattr(model, part).parameters(), 1e-3, betas=(0.5, 0.999))
        for part in ("generator", "discriminator")
    }
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(12):
        for images, _ in data.shuffled_batches(digits.train_images, digits.train_labels, 32, order):
            for part, loss in (
                ("discriminator", lambda images=images: model.discriminator_loss(images)),
                ("generator", lambda: model.generator_loss(32)),
            ):
                value = loss()
                steps_of[part].zero_grad()
                value.backward()
                steps_of[part].step()
                losses.append(value.item())

    samples = model.sample(1000)
    classes, certainty = recognised(classifier, samples)
    assert untrained.eq(0).sum() >= 3
    assert classes.min() >= 10
    assert certainty >= 0.7
    real = digits.train_images
    assert (samples.mean(0) - real.mean(0)).abs().mean() < 0.2 * real.std()
    assert samples.std().item() == pytest.approx(real.std().item(), rel=0.1)
    assert 0.1 < sum(losses[-64::2]) / 32 < 2 * math.log(2)  # the discriminator still sees a difference, and not all
