"""Cross-validation: the folds, scikit-learn's scores, networks, and what it refuses."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import data, models, nn
from dlkernels.train.cross_validation import FoldScores, cross_validate, estimator_score, problem_score
from dlkernels.train.problem import Examples, Problem, fit

linear_model = pytest.importorskip("sklearn.linear_model")
model_selection = pytest.importorskip("sklearn.model_selection")
neighbors = pytest.importorskip("sklearn.neighbors")


def digits(count: int = 300) -> Examples:
    split = data.load_digits(0)
    return split.train_images[:count], split.train_labels[:count]


def numbered(labels: Tensor) -> Tensor:
    """Images of one pixel, which say which example they are."""
    return torch.arange(len(labels)).float().view(-1, 1, 1, 1)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("folds", [2, 5, 7])
def test_each_example_validates_once_and_trains_otherwise(folds: int, stratified: bool) -> None:
    labels = torch.tensor([0] * 24 + [1] * 9)
    seen: list[tuple[Examples, Examples]] = []

    def score(train: Examples, validation: Examples) -> float:
        seen.append((train, validation))
        return 0.0

    cross_validate(score, numbered(labels), labels, folds, stratified=stratified)
    assert len(seen) == folds
    assert sorted(torch.cat([images.flatten() for _, (images, _) in seen]).tolist()) == list(range(33))
    for train, validation in seen:
        assert sorted(torch.cat([train[0], validation[0]]).flatten().tolist()) == list(range(33))
        for images, classes in (train, validation):
            assert torch.equal(labels[images.flatten().long()], classes)
        assert 33 // folds <= len(validation[1]) <= 33 // folds + (2 if stratified else 1)
        if stratified:
            assert 9 // folds <= int(validation[1].sum()) <= 9 // folds + 1


def test_the_seed_deals_the_examples() -> None:
    labels = torch.arange(60) % 3

    def first_fold(seed: int) -> list[float]:
        dealt: list[list[float]] = []

        def score(train: Examples, validation: Examples) -> float:
            dealt.append(validation[0].flatten().tolist())
            return 0.0

        cross_validate(score, numbered(labels), labels, seed=seed)
        return dealt[0]

    assert first_fold(1) == first_fold(1) != first_fold(2)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize(
    "estimator", [neighbors.KNeighborsClassifier(3), linear_model.RidgeClassifier()], ids=["neighbours", "ridge"]
)
def test_scores_are_those_of_scikit_learn(estimator: Any, stratified: bool) -> None:
    images, labels = digits()
    found = cross_validate(estimator_score(estimator), images, labels, 4, stratified=stratified, seed=3)
    splitter = model_selection.StratifiedKFold if stratified else model_selection.KFold
    folds = splitter(4, shuffle=True, random_state=3)
    expected = model_selection.cross_val_score(estimator, images.flatten(1).numpy(), labels.numpy(), cv=folds)
    assert found.scores == tuple(expected)
    assert not hasattr(estimator, "classes_")  # each fold has a copy of its own


def test_mean_and_deviation_are_those_of_the_scores() -> None:
    found = FoldScores((0.5, 0.75, 1.0))
    assert found.mean == 0.75
    assert found.deviation == statistics.stdev(found.scores) == 0.25


def linear_problem() -> Problem:
    train, validation = digits(), digits(50)
    return Problem(lambda: models.LinearClassifier(64), nn.CrossEntropyLoss(), train, validation, 10)


def test_a_network_is_trained_anew_for_each_fold() -> None:
    problem = linear_problem()
    seen: list[float] = []

    def expected(train: Examples, validation: Examples) -> float:
        fold = Problem(problem.build, problem.loss, train, validation, 10)
        seen.append(fit(fold, 4, 1e-2, 1e-3).validation_accuracy[-1])
        return seen[-1]

    found = cross_validate(problem_score(problem, 4, 1e-2, 1e-3), *problem.train, folds=3)
    assert found == cross_validate(expected, *problem.train, folds=3)
    assert min(seen) > 0.7


def test_a_run_that_diverges_has_no_accuracy() -> None:
    problem = linear_problem()
    assert cross_validate(problem_score(problem, 2, 1e30), *problem.train, folds=2).scores == (0.0, 0.0)


def test_what_cannot_be_dealt_is_refused() -> None:
    score = estimator_score(neighbors.KNeighborsClassifier(1))
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    images = numbered(labels)
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        cross_validate(score, images, labels, 1)
    with pytest.raises(ValueError, match="folds must be at most the number of examples, 9, got 10"):
        cross_validate(score, images, labels, 10, stratified=False)
    with pytest.raises(ValueError, match="at most the examples of each class, class 2 has 2, got 3"):
        cross_validate(score, images, labels, 3)
    assert len(cross_validate(score, images, labels, 9, stratified=False).scores) == 9
    with pytest.raises(ValueError, match=r"labels must be \[9\], a class for each image, got \[8\]"):
        cross_validate(score, images, labels[:8])
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        problem_score(linear_problem(), 0, 1e-3)
