"""Lecture 2: the nearest neighbours of an image, and how a setting is chosen without the test data.

A k-nearest-neighbour classifier keeps the training set; an image gets the class that most of the k nearest training
images have. Training costs nothing and every answer a pass over the whole set, which is the wrong way round. Two
settings are not learnt, the distance and k. They are chosen on data that is neither trained on nor tested on: each of k
folds of the training set validates once, and the mean over the folds decides, with their deviation to say how far it
can be trusted. Then come the two reasons not to leave it at that: in many dimensions nothing is near, and pixels that
lie near each other need not look alike.

The standard form differs from the lecture's sketch in this:

- Folds keep the shares of the classes, and are dealt at random: the order of a data set means something.
- Test data is looked at once, by one classifier. The best of many on the test data would look better than it is.
- The error bar is the sample deviation over the folds. They share most of their training data, so it is no confidence
  interval; choices within one bar of each other are as good as equal.
- That it takes so many points to fill a space holds for points that fill it. Digits do not: in the space of
  64 pixels they are as close to each other as uniform points in eight dimensions, and only that makes them of use.

Run it: ``python examples/lecture_02_nearest_neighbours.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lesson import arguments, save_figure, save_regions, show_table, spiral
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import pad

from dlkernels import data, visualize
from dlkernels.train.cross_validation import FoldScores, cross_validate, estimator_score
from dlkernels.visualize.figures import plot

FOLDS = 5
DISTANCES = {"L1": 1, "L2": 2}  # the sum of absolute differences; the root of the sum of squares
Choice = tuple[str, int]  # the distance and k


def classifier(choice: Choice) -> KNeighborsClassifier:
    distance, k = choice
    return KNeighborsClassifier(k, p=DISTANCES[distance], algorithm="brute")


def choose(split: data.Split, ks: Sequence[int], output: Path) -> Choice:
    """Cross-validates both distances with every k; at last the best of them is tested."""
    train, test = (split.train_images, split.train_labels), (split.test_images, split.test_labels)
    choices = [(distance, k) for distance in DISTANCES for k in ks]
    scores = {choice: estimator_score(classifier(choice)) for choice in choices}
    validated = {choice: cross_validate(scores[choice], *train, FOLDS) for choice in choices}

    def of(distance: str, k: int) -> str:
        found = validated[distance, k]
        return f"{found.mean:.4f} ± {found.deviation:.4f}"

    columns = ("k", *(f"by {distance}" for distance in DISTANCES))
    show_table(
        f"Validation accuracy, mean and deviation over {FOLDS} folds of {len(train[1])} digits",
        columns,
        [(k, *(of(distance, k) for distance in DISTANCES)) for k in ks],
    )
    draw_choices(validated, ks, output)

    memory = {choice: scores[choice](train, train) for choice in choices}
    by_heart = max(choices, key=lambda choice: memory[choice])
    best = max(choices, key=lambda choice: validated[choice].mean)
    rows = [("training data", *by_heart, memory[by_heart], validated[by_heart].mean)]
    for fold in range(FOLDS):
        winner = max(choices, key=lambda choice: validated[choice].scores[fold])
        rows.append((f"fold {fold + 1} alone", *winner, validated[winner].scores[fold], validated[winner].mean))
    rows.append((f"all {FOLDS} folds", *best, validated[best].mean, validated[best].mean))
    show_table("What is chosen on what", ("chosen on", "distance", "k", "accuracy there", "mean over folds"), rows)
    sizes = (len(train[1]) - len(train[1]) // FOLDS, len(train[1]) // FOLDS, len(test[1]))
    show_table(
        "The choice, trained on all training digits, on the test digits",
        ("distance", "k", "to train / validate / test", "test accuracy"),
        [(*best, " / ".join(map(str, sizes)), scores[best](train, test))],
    )
    return best


def draw_choices(validated: dict[Choice, FoldScores], ks: Sequence[int], output: Path) -> None:
    """Accuracy over k: each fold a dot, their mean a line, their deviation a bar."""
    figure, axis = plot("Cross-validation on digits", "k", f"validation accuracy, {FOLDS} folds")
    for (distance, shift), colour in zip({"L1": 0.98, "L2": 1.02}.items(), ("tab:blue", "tab:orange"), strict=True):
        found = [validated[distance, k] for k in ks]
        x = [shift * k for k in ks]
        bars = ([scores.mean for scores in found], [scores.deviation for scores in found])
        axis.errorbar(x, *bars, color=colour, marker="o", capsize=3, label=f"{distance}, mean ± deviation")
        dots = [(place, score) for place, scores in zip(x, found, strict=True) for score in scores.scores]
        axis.scatter(*zip(*dots, strict=True), color=colour, s=8, alpha=0.4)
    axis.set_xscale("log")
    axis.set_xticks(ks, map(str, ks))
    axis.minorticks_off()
    axis.legend(fontsize=8)
    save_figure(figure, output / "cross_validation.png")


def near_to_far(queries: Tensor, points: Tensor) -> float:
    """Distance of the nearest of ``points`` over their mean distance, averaged over the queries."""
    distances = torch.cdist(queries.flatten(1).double(), points.flatten(1).double())
    return (distances.amin(1) / distances.mean(1)).mean().item()


def curse_of_dimensionality(split: data.Split, choice: Choice, noises: Sequence[int], output: Path) -> None:
    """How far apart uniform points are by dimension, where digits lie, and what pixels of noise do to neighbours."""
    dimensions = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ratios = [near_to_far(torch.rand(200, count), torch.rand(1000, count)) for count in dimensions]
    digits = near_to_far(split.test_images, split.train_images)
    rows: list[tuple[object, ...]] = [
        (count, ratio, 0.01 ** (1 / count), f"{4.0**count:.3g}")
        for count, ratio in zip(dimensions, ratios, strict=True)
    ]
    columns = ("dimensions", "nearest / mean distance", "edge of a cube with 1 %", "points, 4 an axis")
    show_table("1000 points, uniform in the unit cube", columns, [*rows, ("64, digits", digits, "", "")])

    figure, axis = plot("The nearest of 1000 points is hardly nearer than the mean", "dimensions", "nearest / mean")
    axis.plot(dimensions, ratios, marker="o", label="uniform points")
    axis.plot([split.train_images[0].numel()], [digits], marker="s", linestyle="none", label="digits")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8)
    save_figure(figure, output / "curse_of_dimensionality.png")

    rows = []
    for count in noises:
        with_noise = torch.cat([split.train_images.flatten(1), torch.randn(len(split.train_labels), count)], 1)
        found = cross_validate(estimator_score(classifier(choice)), with_noise, split.train_labels, FOLDS)
        ratio = near_to_far(with_noise[:200], with_noise[200:])
        rows.append((count, ratio, f"{found.mean:.3f} ± {found.deviation:.3f}"))
    columns = ("pixels of noise", "nearest / mean distance", "validation accuracy")
    show_table("Digits with pixels of noise, as strong as their own 64, beside them", columns, rows)


def what_pixels_miss(split: data.Split, choice: Choice, output: Path) -> None:
    """Changes that leave a digit what it is, and how far they take it; and the neighbours of digits that are missed."""
    train_images, images, labels = split.train_images, split.test_images, split.test_labels
    fitted = classifier(choice).fit(train_images.flatten(1).numpy(), split.train_labels.numpy())
    background = images.min().item()
    of_another = labels[:, None] != split.train_labels

    def distances(first: Tensor, second: Tensor) -> Tensor:
        return torch.cdist(first.flatten(1), second.flatten(1), p=DISTANCES[choice[0]])

    other_class = distances(images, train_images).where(of_another, torch.inf).amin(1)
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "nothing": lambda x: x,
        "half the contrast": lambda x: x / 2,
        "a pixel to the right": lambda x: pad(x, (1, -1, 0, 0), value=background),
        "a pixel down": lambda x: pad(x, (0, 0, 1, -1), value=background),
        "two pixels to the right": lambda x: pad(x, (2, -2, 0, 0), value=background),
    }
    rows = []
    for name, change in changes.items():
        changed = change(images)
        moved = (changed - images).flatten(1).norm(DISTANCES[choice[0]], 1)
        right = fitted.score(changed.flatten(1).numpy(), labels.numpy())
        rows.append((name, moved.mean().item(), (moved > other_class).double().mean().item(), right))
    columns = (f"changed by ({choice[0]}, k = {choice[1]})", "distance", "farther than another class", "recognised")
    nearest = f"the nearest training digit of another class is {other_class.mean():.2f} away"
    show_table(f"Test digits, changed; {nearest}", columns, rows)

    missed = torch.from_numpy(fitted.predict(images.flatten(1).numpy())) != labels
    wrong, right = missed.nonzero().flatten(), (~missed).nonzero().flatten()
    shown = torch.cat([wrong[:5], right[:2]])
    away, indices = fitted.kneighbors(images[shown].flatten(1).numpy(), 6)
    found = (torch.from_numpy(indices), torch.from_numpy(away))
    figure = visualize.draw_neighbours(images[shown], labels[shown], train_images, split.train_labels, *found)
    figure.suptitle(f"Nearest in pixels: {len(wrong[:5])} missed test digits, 2 recognised", fontsize=11)
    save_figure(figure, output / "neighbours.png")


def regions(output: Path) -> None:
    """What k does: the more neighbours vote, the smoother the borders."""
    points, labels = spiral(100, noise=0.4)

    def votes(k: int) -> Callable[[Tensor], Tensor]:
        fitted = KNeighborsClassifier(k).fit(points.numpy(), labels.numpy())
        return lambda plane: torch.from_numpy(fitted.predict(plane.numpy()))

    save_regions(output / "regions.png", {f"k = {k}": votes(k) for k in (1, 5, 25)}, points, labels)


def main() -> None:
    options = arguments("lecture_02", __doc__)
    torch.manual_seed(0)
    split = data.load_digits(0)
    ks, noises = ((1, 3, 10), (0, 256)) if options.fast else ((1, 2, 3, 4, 5, 7, 10, 20, 50, 100), (0, 64, 256, 1024))
    choice = choose(split, ks, options.output)
    curse_of_dimensionality(split, choice, noises, options.output)
    what_pixels_miss(split, choice, options.output)
    regions(options.output)


if __name__ == "__main__":
    main()
