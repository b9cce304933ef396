"""k-fold cross-validation (Stone 1974): each example validates once, a classifier that has not been trained on it.

scikit-learn deals the folds; what is trained on them is a function of the training and the validation examples, which
:func:`estimator_score` makes of an estimator of scikit-learn, and :func:`problem_score` of a network's problem::

    found = cross_validate(estimator_score(KNeighborsClassifier(5)), images, labels, folds=5)
    print(f"{found.mean:.3f} ± {found.deviation:.3f}")
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .problem import Examples, Problem, fit

Score = Callable[[Examples, Examples], float]  # of training and validation examples; the larger, the better


@dataclass(frozen=True)
class FoldScores:
    """The score on each fold, of who was trained on the others."""

    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the folds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the folds: their number less one divides."""
        return statistics.stdev(self.scores)


def cross_validate(
    score: Score, images: Tensor, labels: Tensor, folds: int = 5, *, stratified: bool = True, seed: int = 0
) -> FoldScores:
    """Scores a classifier on each of ``folds`` equal parts of the examples after training on the others.

    Args:
        score: trains a fresh classifier on the first examples and scores it on the second.
        images: ``[N, ...]``.
        labels: their classes ``[N]``.
        folds: how many parts.
        stratified: whether each part has the classes in the shares that all examples have them in.
        seed: deals the examples.

    Raises:
        ValueError: there are not as many labels as images, fewer than two folds, fewer examples than folds or, with
            ``stratified``, fewer of a class.
    """
    from sklearn.model_selection import KFold, StratifiedKFold

    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be [{len(images)}], a class for each image, got {list(labels.shape)}")
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    if len(labels) < folds:
        raise ValueError(f"folds must be at most the number of examples, {len(labels)}, got {folds}")
    classes, counts = labels.unique(return_counts=True)
    if stratified and counts.min() < folds:
        rarest = f"class {int(classes[counts.argmin()])} has {int(counts.min())}"
        raise ValueError(f"folds must be at most the examples of each class, {rarest}, got {folds}")
    splitter = (StratifiedKFold if stratified else KFold)(folds, shuffle=True, random_state=seed)
    scores = []
    dealt = labels.cpu().numpy()
    for rows in splitter.split(dealt, dealt):
        train, validation = (torch.from_numpy(part) for part in rows)
        scores.append(float(score((images[train], labels[train]), (images[validation], labels[validation]))))
    return FoldScores(tuple(scores))


def estimator_score(estimator: Any) -> Score:
    """What scikit-learn's ``estimator`` scores, of a classifier its accuracy, with the pixels of an image in a row."""
    from sklearn.base import clone

    def arrays(examples: Examples) -> tuple[Any, Any]:
        images, labels = examples
        return images.flatten(1).cpu().numpy(), labels.cpu().numpy()

    return lambda train, validation: clone(estimator).fit(*arrays(train)).score(*arrays(validation))


def problem_score(problem: Problem, epochs: int, learning_rate: float, weight_decay: float = 0.0) -> Score:
    """The validation accuracy of the problem's network after ``epochs`` on other examples than its own.

    Raises:
        ValueError: ``epochs`` is not positive.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")

    def score(train: Examples, validation: Examples) -> float:
        fold = replace(problem, train=train, validation=validation)
        return fit(fold, epochs, learning_rate, weight_decay).final_accuracy

    return score
