"""Lecture 3: linear classifiers, their losses, and what a penalty does to the weights.

A linear classifier scores each class by a weighted sum of the pixels. The weights of a class are a picture, its
template; together with the bias they are a plane that divides the space of images. What the weights should be is said
by a loss: softmax, which wants the probability of the right class to be one, or a margin (multiclass support vector
machine), which wants its score above all others by one, and is then content. A penalty says which of the weights that
do as well are preferred. All of it rests on gradients, which are checked against differences before they are used.

The standard form differs from the lecture's sketch in this:

- The margin loss of a library is a mean over the classes, the lecture's a sum: torch's is smaller by the factor C.
- With no weights at all softmax starts at log C, the sum of margins at C - 1.
- A temperature divides the logits. It changes how sure a classifier is and nothing about what it decides; a temperature
  in training only makes the weights grow by as much in the end.
- A penalty is on the weights and not on the bias, which says how frequent a class is.
- The subgradient of |w| brings weights near zero and then past it, back and forth. Exact zeros need the proximal step:
  after the step on the loss, all weights are shrunk by the same amount and stop at zero.
- Differences are taken on both sides, in float64: the error then falls as the square of the step, until rounding, which
  grows as the step shrinks, takes over.

Run it: ``python examples/lecture_03_linear_classifiers.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lesson import accuracy, arguments, drawn, fit, learnt, save_figure, show_table
from torch import Tensor
from torch.nn.functional import one_hot, softshrink

from dlkernels import data, functional, models, nn, visualize
from dlkernels.train.cross_validation import cross_validate, problem_score
from dlkernels.train.problem import Problem
from dlkernels.visualize.figures import grid, plot, show_map

CLASSES = 10
PIXELS = 64
cross_entropy = nn.CrossEntropyLoss()


def softmax_at(temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, labels: cross_entropy(scores / temperature, labels)


def margins(scores: Tensor, labels: Tensor, power: int) -> Tensor:
    """The multiclass margin loss, written out: by how much each wrong class comes within one of the right one."""
    wrong = (scores - scores.gather(1, labels[:, None]) + 1).clamp_min(0) ** power
    return (wrong * (1 - one_hot(labels, CLASSES))).sum(1).mean()


def three_views(split: data.Split) -> None:
    """The same scores as weights and bias, with the bias as a weight, and as templates laid over the image."""
    model, images = models.LinearClassifier(PIXELS), split.test_images
    torch.nn.init.normal_(model.scores.weight)
    torch.nn.init.normal_(model.scores.bias)
    with torch.no_grad():
        scores = model(images)
        extended = torch.cat([model.scores.weight, model.scores.bias[:, None]], 1)  # [10, 65]
        with_one = torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1)  # [N, 65]
        templates = visualize.first_layer_filters(model, (1, 8, 8))
        laid_over = torch.einsum("nchw,kchw->nk", images, templates) + model.scores.bias
    rows = [
        ("bias as the weight of a pixel that is one", (with_one @ extended.T - scores).abs().max().item()),
        ("templates laid over the image", (laid_over - scores).abs().max().item()),
    ]
    written = [(name, f"{difference:.1e}", f"{scores.abs().max():.1f}") for name, difference in rows]
    show_table("W x + b in other words", ("", "scores differ by", "largest score"), written)


def losses(split: data.Split, steps: int) -> dict[str, models.LinearClassifier]:
    """Trains with each loss: where it starts, where it should, what it comes to."""
    kinds: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
        "softmax": (cross_entropy, math.log(CLASSES)),
        "softmax, T = 2": (softmax_at(2), math.log(CLASSES)),
        "margin": (torch.nn.MultiMarginLoss(), (CLASSES - 1) / CLASSES),
        "squared margin": (torch.nn.MultiMarginLoss(p=2), (CLASSES - 1) / CLASSES),
    }
    trained, rows = {}, []
    for name, (loss, expected) in kinds.items():
        torch.manual_seed(0)
        model = trained[name] = models.LinearClassifier(PIXELS)
        with torch.no_grad():
            first = loss(model(split.train_images), split.train_labels).item()

        def objective(images: Tensor, labels: Tensor, model: Any = model, loss: Any = loss) -> Tensor:
            return loss(model(images), labels)

        batch = drawn(split.train_images, split.train_labels, count=32)
        fit(name, steps, batch, [(objective, learnt(model))], 1e-2)
        with torch.no_grad():
            last = loss(model(split.train_images), split.train_labels).item()
        weight = model.scores.weight.norm().item()
        rows.append((name, first, expected, last, weight, accuracy(model, split.test_images, split.test_labels)))
    columns = ("", "first loss", "by formula", "last loss", "length of W", "test accuracy")
    show_table(f"Losses, {steps} steps each; the first is that of equal scores", columns, rows)

    scores, labels = torch.randn(50, CLASSES), torch.randint(CLASSES, (50,))
    rows = []
    for power, name in ((1, "margin"), (2, "squared margin")):
        library = torch.nn.MultiMarginLoss(p=power)(scores, labels).item()
        rows.append((name, margins(scores, labels, power).item(), library, CLASSES * library))
    show_table("Margins of random scores", ("", "as the lecture's sum", "torch's", f"{CLASSES} times that"), rows)
    return trained


def temperatures(model: torch.nn.Module, split: data.Split) -> None:
    """One trained classifier, asked at several temperatures."""
    with torch.no_grad():
        scores = model(split.test_images)
    rows = []
    for temperature in (0.25, 1.0, 4.0, 16.0):
        probabilities = (scores / temperature).softmax(1)
        loss = functional.cross_entropy(scores / temperature, split.test_labels).item()
        right = (probabilities.argmax(1) == split.test_labels).double().mean().item()
        rows.append((f"{temperature:g}", probabilities.amax(1).mean().item(), loss, right))
    show_table("Temperature", ("", "mean largest probability", "test loss", "test accuracy"), rows)


class OnePercentTooLong(torch.autograd.Function):
    """Returns what it is given; its gradient is wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 1.01 * gradients[0]


def gradient_check(split: data.Split, output: Path) -> None:
    """The gradient of the softmax loss by its formula, by our kernel and by differences; then by torch's own check."""
    x, labels = split.train_images[:20].flatten(1).double(), split.train_labels[:20]
    weight = (0.1 * torch.randn(CLASSES, PIXELS, dtype=torch.float64)).requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(x, weight), labels)

    (kernels,) = torch.autograd.grad(loss(weight), weight)
    weight = weight.detach()
    formula = ((x @ weight.T).softmax(1) - one_hot(labels, CLASSES)).T @ x / len(x)

    def difference(place: tuple[int, int], step: float, both_sides: bool) -> float:
        moved = torch.zeros_like(weight)
        moved[place] = step
        before, width = (weight - moved, 2 * step) if both_sides else (weight, step)
        return ((loss(weight + moved) - loss(before)) / width).item()

    places = [(row, 20 + 3 * row) for row in range(CLASSES)]
    rows = []
    for row, column in places[:5]:
        values = (formula[row, column].item(), kernels[row, column].item(), difference((row, column), 1e-5, True))
        rows.append((f"class {row}, pixel {column}", *(f"{value:+.10f}" for value in values)))
    show_table("Gradient of the softmax loss", ("weight", "by the formula", "by our kernel", "by differences"), rows)

    exact = torch.stack([kernels[place] for place in places])
    steps = [10.0**-power for power in range(1, 13)]
    figure, axis = plot("Differences against the gradient, in float64", "step", "error, relative to the largest")
    for name, both_sides in (("on one side", False), ("on both sides", True)):
        errors = []
        for step in steps:
            numeric = torch.tensor([difference(place, step, both_sides) for place in places], dtype=torch.float64)
            errors.append(((numeric - exact).abs().max() / exact.abs().max()).item())
        axis.plot(steps, errors, marker="o", label=name)
    axis.set(xscale="log", yscale="log")
    axis.legend(fontsize=8)
    save_figure(figure, output / "gradient_check.png")

    scores = (x @ weight.T).requires_grad_()
    checked: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": partial(functional.cross_entropy, target=labels),
        "softmax, T = 2": lambda scores: softmax_at(2)(scores, labels),
        "squared margin": lambda scores: torch.nn.MultiMarginLoss(p=2)(scores, labels),
        "softmax, gradient 1 % too long": lambda scores: cross_entropy(OnePercentTooLong.apply(scores), labels),
    }
    passed = [
        (name, "passes" if torch.autograd.gradcheck(function, (scores,), raise_exception=False) else "fails")
        for name, function in checked.items()
    ]
    show_table("torch.autograd.gradcheck", ("loss", ""), passed)


def descend(split: data.Split, steps: int, l1: float, l2: float, proximal: bool = True) -> models.LinearClassifier:
    """Gradient descent on the softmax loss plus ``l1 * |W|_1 + l2 * |W|_2^2`` over all training digits."""
    torch.manual_seed(0)
    model, learning_rate = models.LinearClassifier(PIXELS), 0.1
    weight = model.scores.weight
    optimizer = torch.optim.SGD(model.parameters(), learning_rate)
    for _ in range(steps):
        loss = cross_entropy(model(split.train_images), split.train_labels) + l2 * weight.square().sum()
        if not proximal:
            loss = loss + l1 * weight.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if proximal:
            with torch.no_grad():
                weight.copy_(softshrink(weight, learning_rate * l1))
    return model


def penalties(split: data.Split, steps: int) -> dict[str, models.LinearClassifier]:
    """What each penalty makes of the weights."""
    kinds = {
        "no penalty": descend(split, steps, 0.0, 0.0),
        "L2": descend(split, steps, 0.0, 1e-2),
        "L1": descend(split, steps, 3e-3, 0.0),
        "L1, subgradient": descend(split, steps, 3e-3, 0.0, proximal=False),
        "L1 and L2": descend(split, steps, 3e-3, 1e-2),
    }
    rows = []
    for name, model in kinds.items():
        size = model.scores.weight.detach().abs()
        zero, near = ((size <= bound).double().mean().item() for bound in (0.0, 1e-2))
        fits = accuracy(model, split.train_images, split.train_labels)
        right = accuracy(model, split.test_images, split.test_labels)
        rows.append((name, f"{zero:.0%}", f"{near:.0%}", size.max().item(), size.norm().item(), fits, right))
    columns = ("weights", "at 0", "below 0.01", "largest", "length", "training", "test")
    show_table(f"Penalties, {steps} steps each, and accuracy", columns, rows)
    return kinds


def chosen_penalty(split: data.Split, epochs: int, folds: int) -> None:
    """The strength of the L2 penalty by cross-validation; then the softmax classifier with it, tested once."""

    def sgd(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, learning_rate, momentum=0.9, weight_decay=weight_decay)

    train, test = (split.train_images, split.train_labels), (split.test_images, split.test_labels)
    build = partial(models.LinearClassifier, PIXELS)
    problem = Problem(build, cross_entropy, train, test, CLASSES, optimizer=sgd)
    scores = {decay: problem_score(problem, epochs, 1e-2, decay) for decay in (0.0, 1e-3, 1e-2, 1e-1)}
    found = {decay: cross_validate(score, *train, folds) for decay, score in scores.items()}
    best = max(found, key=lambda decay: found[decay].mean)
    rows = [
        (f"{decay:g}", f"{one.mean:.3f} ± {one.deviation:.3f}", scores[decay](train, test) if decay == best else "")
        for decay, one in found.items()
    ]
    columns = ("L2 penalty", f"validation accuracy, {folds} folds", "test accuracy of the best")
    show_table("Softmax classifier, penalty chosen by cross-validation", columns, rows)


def draw_templates(classifiers: dict[str, models.LinearClassifier], path: Path) -> None:
    """A row for each classifier: what speaks for a class in red, what against it in blue."""
    title = "Templates: red pixels speak for a digit, blue ones against it; each row has its own scale"
    figure, axes = grid(len(classifiers), CLASSES, title, 1.1, 1.25)
    for row, (name, model) in zip(axes, classifiers.items(), strict=True):
        templates = visualize.first_layer_filters(model, (1, 8, 8)).squeeze(1)
        for label, (axis, template) in enumerate(zip(row, templates, strict=True)):
            show_map(axis, template, str(label), templates.abs().max().item())
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, rotation=90, ha="right", va="center", fontsize=9)
    save_figure(figure, path)


def main() -> None:
    options = arguments("lecture_03", __doc__)
    torch.manual_seed(0)
    split = data.load_digits(0)
    steps, descents, epochs, folds = (60, 100, 2, 2) if options.fast else (450, 3000, 10, 5)
    three_views(split)
    gradient_check(split, options.output)
    trained = losses(split, steps)
    temperatures(trained["softmax"], split)
    penalised = penalties(split, descents)
    chosen_penalty(split, epochs, folds)
    shown = {name: trained[name] for name in ("softmax", "margin")}
    shown |= {name: penalised[name] for name in ("no penalty", "L2", "L1")}
    draw_templates(shown, options.output / "templates.png")


if __name__ == "__main__":
    main()
