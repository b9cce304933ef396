"""The three-layer convolutional network and LeNet: as on torch's layers, their sizes, and what they learn of digits."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from dlkernels import data, models, nn

from .cases.learning import accuracy, fit
from .cases.networks import compare_with_torch

DTYPES = (torch.float32, torch.float64)

NETWORKS: dict[str, Callable[[ModuleType], torch.nn.Module]] = {
    "three_layers": lambda layers: models.ThreeLayerConvNet(8, 2, 5, 4, 3, 6, layers=layers),
    "three_layers_batch_norm": lambda layers: models.ThreeLayerConvNet(8, 2, 5, 4, 3, 6, True, layers=layers),
    "three_layers_fractional": lambda layers: models.ThreeLayerConvNet(8, 2, 5, 4, 3, 6, True, 0.7, layers=layers),
    "lenet": lambda layers: models.LeNet(8, 2, 5, (4, 6), layers=layers),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_compute_what_they_compute_on_torchs_layers(network: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 8, 8, dtype=dtype)
    compare_with_torch(NETWORKS[network], lambda model: model(x), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_size", [28, 32])
def test_lenet5_computes_what_it_computes_on_torchs_layers(image_size: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 1, image_size, image_size, dtype=dtype)
    compare_with_torch(lambda layers: models.LeNet5(image_size, layers=layers), lambda model: model(x), dtype)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5", 61_706),
        ("threelayerconvnet", 32 * 3 * 49 + 32 + 32 * 256 * 100 + 100 + 100 * 10 + 10),
        ("lenet", 16 * 25 + 32 + 32 * 16 * 25 + 64 + 32 * 49 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in models.get_model(name).parameters()) == parameters


def test_lenet5_pads_small_images_to_its_own_size() -> None:
    padded, full = models.LeNet5(28), models.LeNet5(32)
    full.load_state_dict(padded.state_dict(), strict=True)
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(padded(x), full(torch.nn.functional.pad(x, (2, 2, 2, 2))))


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be 28 or 32, got 8"):
        models.LeNet5(8)
    with pytest.raises(ValueError, match="image_size must be positive and even, got 7"):
        models.ThreeLayerConvNet(7)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        models.ThreeLayerConvNet(8, kernel_size=4)
    for share in (0.4, 1.0):
        with pytest.raises(ValueError, match=rf"fractional_pooling must be in \[0.5, 1\), got {share}"):
            models.ThreeLayerConvNet(8, fractional_pooling=share)


def test_fractional_pooling_leaves_its_share_of_the_image_and_pools_elsewhere_each_time() -> None:
    model = models.ThreeLayerConvNet(8, in_channels=1, fractional_pooling=0.7).eval()
    assert model.hidden.in_features == 32 * 5 * 5  # 0.7 times 8 is 5.6
    x = torch.randn(2, 1, 8, 8)
    assert not torch.allclose(model(x), model(x))
    halving = models.ThreeLayerConvNet(8, in_channels=1)
    torch.testing.assert_close(halving(x), halving(x))


def test_a_small_convolutional_network_with_batch_norm_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    model = models.ThreeLayerConvNet(8, in_channels=1, kernel_size=3, batch_norm=True)
    loss = nn.CrossEntropyLoss()
    fit(
        model.parameters(),
        lambda images, labels: loss(model(images), labels),
        digits.train_images,
        digits.train_labels,
        epochs=8,
        learning_rate=3e-3,
    )
    assert accuracy(model, digits.test_images, digits.test_labels) >= 0.98
