"""What frozen features are worth: the classifiers as others compute them, and encoders left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dlkernels import models, nn, ssl

from .cases.self_supervision import digits


def clouds(count: int = 60, classes: int = 3, features: int = 4) -> tuple[Tensor, Tensor]:
    """Normal clouds around a point for each class, which overlap."""
    labels = torch.arange(count) % classes
    return torch.randn(classes, features)[labels] + 0.7 * torch.randn(count, features), labels


def test_the_probe_is_the_optimum_that_scikit_learn_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = (x.double() if x.is_floating_point() else x for x in clouds())
    queries = torch.randn(500, 4, dtype=torch.float64)
    mean, deviation = features.mean(0), features.std(0)
    peer = linear_model.LogisticRegression(C=1 / (0.1 * len(features)), tol=1e-10, max_iter=1000)
    peer.fit(((features - mean) / deviation).numpy(), labels.numpy())
    expected = peer.predict(((queries - mean) / deviation).numpy())
    assert torch.equal(ssl.linear_probe(features, labels, queries, penalty=0.1), torch.from_numpy(expected))


def test_a_probe_does_not_care_for_scale_or_for_features_that_never_change() -> None:
    features, labels = clouds()
    queries = torch.randn(100, 4)
    expected = ssl.linear_probe(features, labels, queries)
    moved = [torch.cat([1000 * x + 7, torch.ones(len(x), 1)], 1) for x in (features, queries)]
    assert (ssl.linear_probe(moved[0], labels, moved[1]) == expected).float().mean() >= 0.99


@pytest.mark.parametrize("k", [1, 5, 60])
def test_neighbours_vote_with_their_weights(k: int) -> None:
    features, labels = clouds()
    queries = torch.randn(20, 4)
    expected = []
    for query in queries:
        cosines = [(query @ row / query.norm() / row.norm()).item() for row in features]
        votes = [0.0, 0.0, 0.0]
        for index in sorted(range(60), key=lambda i: -cosines[i])[:k]:
            votes[labels[index]] += torch.tensor(cosines[index] / 0.07, dtype=torch.float64).exp().item()
        expected.append(votes.index(max(votes)))
    assert ssl.weighted_knn(features, labels, queries, k).tolist() == expected


def test_one_neighbour_is_the_nearest_and_many_at_a_high_temperature_the_majority() -> None:
    features, labels = normalize(torch.randn(9, 3), dim=1), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1])
    assert ssl.weighted_knn(features, labels, features, 1).tolist() == labels.tolist()
    assert ssl.weighted_knn(features, labels, features, 9, temperature=1e3).tolist() == [1] * 9
    assert ssl.weighted_knn(features, labels, features, 9, temperature=1e-3).tolist() == labels.tolist()


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_is_looked_at_in_evaluation_and_left_as_it_was(training: bool) -> None:
    encoder = torch.nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), torch.nn.Dropout()).train(training)
    encoder[1].eval()  # frozen
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = torch.randn(7, 1, 5, 5)
    features = ssl.features_of(encoder, images, batch_size=3)
    assert [encoder.training, *(layer.training for layer in encoder)] == [training, training, False, training]
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not features.requires_grad
    torch.testing.assert_close(features, encoder.eval()(images).flatten(1))


def test_both_recognise_digits_by_their_pixels() -> None:
    split = digits()
    known, unknown = split.train_images.flatten(1), split.test_images.flatten(1)
    for classes in (
        ssl.linear_probe(known, split.train_labels, unknown),
        ssl.weighted_knn(known, split.train_labels, unknown),
    ):
        assert (classes == split.test_labels).float().mean() >= 0.95


def test_a_network_without_its_last_layer_is_an_encoder() -> None:
    model = models.resnet20()
    model.fc = torch.nn.Identity()
    assert ssl.features_of(model, torch.randn(2, 3, 32, 32)).shape == (2, 64)


def test_what_does_not_fit_is_refused() -> None:
    features, labels = clouds()
    for classify in (ssl.linear_probe, ssl.weighted_knn):
        with pytest.raises(ValueError, match="labels must be of at least two classes"):
            classify(features, torch.ones(60, dtype=torch.int64), features)
        with pytest.raises(
            ValueError, match=r"features must be \[N, D\] and labels \[N\], got shapes \[60, 4\] and \[3\]"
        ):
            classify(features, labels[:3], features)
        with pytest.raises(ValueError, match=r"queries must be \[M, 4\], as features, got shape \[2, 5\]"):
            classify(features, labels, torch.randn(2, 5))
    for k in (0, 61):
        with pytest.raises(ValueError, match=f"k must be between 1 and the number of examples, 60, got {k}"):
            ssl.weighted_knn(features, labels, features, k)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        ssl.weighted_knn(features, labels, features, temperature=0)
    with pytest.raises(ValueError, match="penalty must not be negative, got -1"):
        ssl.linear_probe(features, labels, features, -1)
