"""Linear classifiers and fully connected networks: as on torch's layers, their losses, what they learn of digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from dlkernels import data, functional, models, nn

from .cases.learning import accuracy, fit
from .cases.networks import compare_with_torch

DTYPES = (torch.float32, torch.float64)

NETWORKS: dict[str, Callable[[ModuleType], torch.nn.Module]] = {
    "linear": lambda layers: models.LinearClassifier(12, 5, layers=layers),
    "two_layers": lambda layers: models.TwoLayerNet(12, 7, 5, layers=layers),
    "mlp": lambda layers: models.MLP(12, (8, 7, 6), 5, layers=layers),
    "mlp_batch_norm": lambda layers: models.MLP(12, (8, 7), 5, norm=layers.BatchNorm1d, dropout=0.3, layers=layers),
    "mlp_gelu": lambda layers: models.MLP(12, (8,), 5, torch.nn.GELU, torch.nn.LayerNorm, layers=layers),
}


@pytest.fixture(scope="module")
def digits() -> data.Split:
    pytest.importorskip("sklearn")
    return data.load_digits(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_compute_what_they_compute_on_torchs_layers(network: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 2, 2, dtype=dtype)
    compare_with_torch(NETWORKS[network], lambda model: model(x), dtype)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linearclassifier", 3072 * 10 + 10),
        ("twolayernet", 3072 * 100 + 100 + 100 * 10 + 10),
        ("mlp", 3072 * 100 + 100 + 100 * 100 + 100 + 100 * 10 + 10),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in models.get_model(name).parameters()) == parameters


def test_drop_connect_leaves_out_weights_of_hidden_layers_while_training() -> None:
    plain, dropping = models.MLP(12, (40, 30), 5), models.MLP(12, (40, 30), 5, drop_connect=0.5)
    dropping.load_state_dict(plain.state_dict(), strict=True)
    dropped = [name for name, module in dropping.named_modules() if isinstance(module, nn.DropConnectLinear)]
    assert dropped == ["hidden.0", "hidden.3"]
    x = torch.randn(4, 12)
    torch.testing.assert_close(dropping.eval()(x), plain(x))
    first, second = (dropping.train()(x) for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("layers", "p", "message"),
    [(torch.nn, 0.5, "drop_connect must be 0 on layers of torch.nn, got 0.5"), (nn, 1.5, "p must be between 0 and 1")],
    ids=["torch", "dlkernels"],
)
def test_drop_connect_that_cannot_be_is_refused(layers: ModuleType, p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.MLP(12, (8,), 5, drop_connect=p, layers=layers)


def test_the_bias_is_the_weight_of_a_pixel_that_is_always_one() -> None:
    model = models.LinearClassifier(12, 5)
    torch.nn.init.normal_(model.scores.bias)
    images = torch.randn(3, 12)
    weight = torch.cat([model.scores.weight, model.scores.bias[:, None]], 1)  # [5, 13]
    extended = torch.cat([images, torch.ones(3, 1)], 1)  # [3, 13]
    torch.testing.assert_close(model(images), extended @ weight.T)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": nn.CrossEntropyLoss(),
    "softmax, temperature 2": lambda logits, labels: functional.cross_entropy(logits / 2, labels),
    "svm": torch.nn.MultiMarginLoss(),
    "svm, squared": torch.nn.MultiMarginLoss(p=2),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_linear_classifier_learns_the_digits(loss: str, digits: data.Split) -> None:
    model = models.LinearClassifier(64)

    def step_loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return LOSSES[loss](model(images), labels)

    losses = fit(model.parameters(), step_loss, digits.train_images, digits.train_labels, epochs=10, learning_rate=1e-2)
    # All scores are near zero at first: each class is as likely, and nine in ten of them are wrong by the whole margin.
    assert losses[0] == pytest.approx(math.log(10) if "softmax" in loss else 0.9, rel=1e-3)
    assert accuracy(model, digits.test_images, digits.test_labels) >= 0.94


@pytest.mark.parametrize(
    "build",
    [
        lambda: models.TwoLayerNet(64),
        lambda: models.MLP(64),
        lambda: models.MLP(64, norm=nn.BatchNorm1d, dropout=0.1),
    ],
    ids=["two_layers", "mlp", "mlp_batch_norm"],
)
def test_fully_connected_networks_learn_the_digits(build: Callable[[], torch.nn.Module], digits: data.Split) -> None:
    model, loss = build(), nn.CrossEntropyLoss()
    fit(
        model.parameters(),
        lambda images, labels: loss(model(images), labels),
        digits.train_images,
        digits.train_labels,
        epochs=8,
        learning_rate=3e-3,
    )
    assert accuracy(model, digits.test_images, digits.test_labels) >= 0.95


def test_fifty_samples_are_learnt_by_heart(digits: data.Split) -> None:
    model, loss = models.TwoLayerNet(64), nn.CrossEntropyLoss()
    images, labels = digits.train_images[:50], digits.train_labels[:50]
    assert accuracy(model, images, labels) < 0.5
    losses = fit(
        model.train().parameters(),
        lambda images, labels: loss(model(images), labels),
        images,
        labels,
        epochs=40,
        learning_rate=1e-2,
        batch_size=25,
    )
    assert accuracy(model, images, labels) == 1.0
    assert losses[-1] < 0.01
