"""Autoencoders: as on torch's layers, what they rebuild of digits, and what they take for noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlkernels import data, models

from .cases.learning import fit
from .cases.networks import compare_with_torch


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_it_computes_on_torchs_layers(dtype: torch.dtype, noise: float) -> None:
    x = torch.randn(5, 2, 8, 8, dtype=dtype)
    compare_with_torch(
        lambda layers: models.Autoencoder(8, 2, 6, (4, 8), noise, layers=layers),
        lambda model: (model.loss(x), model(x)),
        dtype,
    )


def test_parameter_count() -> None:
    encoder = (32 * 9 + 2 * 32) + (64 * 32 * 9 + 2 * 64) + (64 * 49 * 32 + 32)
    decoder = (32 * 64 * 49 + 64 * 49) + (32 * 64 * 9 + 2 * 32) + (32 * 9 + 1)
    with torch.device("meta"):
        parameters = models.get_model("autoencoder").parameters()
    assert sum(parameter.numel() for parameter in parameters) == encoder + decoder


def test_all_that_is_rebuilt_passes_through_the_code() -> None:
    model = models.Autoencoder(8, code_features=6).eval()
    x = torch.randn(3, 1, 8, 8)
    code = model.encoder(x)
    assert code.shape == (3, 6)
    assert torch.equal(model.decoder(code), model(x))


def test_noise_is_added_to_what_is_seen_in_training_alone() -> None:
    model = models.Autoencoder(8, noise=0.5)
    x = torch.randn(64, 1, 8, 8)
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.loss(x)
    model(x)
    model.eval().loss(x)
    assert (seen[0] - x).std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(seen[1], x)
    assert torch.equal(seen[2], x)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a positive multiple of 4, got 6"):
        models.Autoencoder(6)
    with pytest.raises(ValueError, match="noise must not be negative, got -0.1"):
        models.Autoencoder(8, noise=-0.1)


def test_it_rebuilds_digits_and_takes_their_noise_away() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    images = digits.test_images
    noisy = images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    error = {}  # of what is rebuilt from noisy images
    for noise in (0.0, 0.5):
        torch.manual_seed(0)
        model = models.Autoencoder(8, code_features=16, widths=(16, 32), noise=noise)
        fit(
            model.parameters(),
            lambda images, labels, model=model: model.loss(images),
            digits.train_images,
            digits.train_labels,
            epochs=15,
            learning_rate=5e-3,
        )
        model.eval()
        with torch.no_grad():
            # A code of 16 numbers for 64 pixels; the mean image alone, a code of none, leaves all the variance.
            assert model.loss(images) < 0.25 * images.var(0).mean()
            error[noise] = (model(noisy) - images).square().mean().item()
    assert error[0.5] < 0.95 * error[0.0]
    assert error[0.5] < 0.6 * 0.5**2
