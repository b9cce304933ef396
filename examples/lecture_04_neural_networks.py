"""Lecture 4: neural networks, and backpropagation through their computational graph.

A second linear layer after a bend (the rectifier) makes a classifier whose regions can have any shape. Its gradient is
found gate by gate: each value of the graph gets the gradient of the loss from the gates that used it, and each gate
multiplies what arrives by its own derivative. That is done here by hand, in plain tensors, for a network with one
hidden layer, and compared with autograd's at every value of the graph and with what the kernels give. Four patterns are
enough: a sum passes its gradient on to all that it added, what was copied adds up, a product swaps its factors, and a
maximum sends all to whoever won. Then networks are trained by minibatch gradient descent: on 50 digits, which they must
be able to learn by heart, on all of them, and on a spiral that no line divides.

The standard form differs from the lecture's sketch in this:

- The loss is a mean over the batch, so the first thing that flows back is 1/N. A sum would tie the learning rate to the
  batch size.
- A value that is used twice gets the sum of both gradients; overwriting one of them is the classic mistake.
- At zero the rectifier has no derivative; 0 is taken, as everywhere.
- Without a bend between them any number of linear layers is one linear layer, whatever their size.
- A minibatch is drawn without repetition from a shuffled training set: an epoch has seen every example once.

Run it: ``python examples/lecture_04_neural_networks.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lesson import accuracy, arguments, descend, fit, learnt, save_figure, save_regions, show_table, spiral
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dlkernels import data, models, nn
from dlkernels.visualize.figures import plot

PIXELS = 64
cross_entropy = nn.CrossEntropyLoss()
Examples = tuple[Tensor, Tensor]

# What flows back to each value of the graph, from the loss to the image; d is the gradient of the loss.
RULES = {
    "loss": "1",
    "losses": "d loss / N, copied",
    "sums": "d losses / sums",
    "powers": "d sums, copied",
    "scores": "d powers * powers, class: -d losses",
    "W2": "(d scores)^T hidden",
    "b2": "d scores, added over N",
    "hidden": "(d scores) W2",
    "z": "d hidden where z > 0",
    "W1": "(d z)^T x",
    "b1": "d z, added over N",
    "x": "(d z) W1",
}


def forward(x: Tensor, labels: Tensor, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """All values of the graph by name, from images ``[N, D]`` to the mean softmax loss."""
    w1, b1, w2, b2 = weights
    z = x @ w1.T + b1  # [N, H]
    hidden = z.clamp_min(0)
    scores = hidden @ w2.T + b2  # [N, C]
    powers = scores.exp()
    sums = powers.sum(1)  # [N]
    losses = sums.log() - scores[torch.arange(len(x)), labels]  # [N]
    values = {"x": x, "W1": w1, "b1": b1, "z": z, "hidden": hidden, "W2": w2, "b2": b2, "scores": scores}
    return {**values, "powers": powers, "sums": sums, "losses": losses, "loss": losses.mean()}


def backward(values: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss with respect to each value, gate by gate, by :data:`RULES`."""
    d = {"loss": torch.ones_like(values["loss"])}
    d["losses"] = d["loss"].expand(len(labels)) / len(labels)
    d["sums"] = d["losses"] / values["sums"]
    d["powers"] = d["sums"][:, None].expand_as(values["powers"])
    d["scores"] = d["powers"] * values["powers"]
    d["scores"][torch.arange(len(labels)), labels] -= d["losses"]
    d["W2"] = d["scores"].T @ values["hidden"]
    d["b2"] = d["scores"].sum(0)
    d["hidden"] = d["scores"] @ values["W2"]
    d["z"] = d["hidden"] * (values["z"] > 0)
    d["W1"] = d["z"].T @ values["x"]
    d["b1"] = d["z"].sum(0)
    d["x"] = d["z"] @ values["W1"]
    return d


def backpropagation(split: data.Split) -> None:
    """Every gradient by hand and by autograd, and those of the weights by the network's kernels, in float64."""
    torch.manual_seed(0)
    model = models.TwoLayerNet(PIXELS, 20).double()
    x, labels = split.train_images[:32].flatten(1).double().requires_grad_(), split.train_labels[:32]
    values = forward(x, labels, list(model.parameters()))
    with torch.no_grad():
        by_hand = backward(values, labels)
    by_autograd = dict(zip(values, torch.autograd.grad(values["loss"], list(values.values())), strict=True))

    loss = cross_entropy(model(x), labels)
    graph = walked(loss.grad_fn, {parameter: name for name, parameter in model.named_parameters()} | {x: "images"})
    loss.backward()
    of_kernels = dict(zip(("W1", "b1", "W2", "b2"), (p.grad for p in model.parameters()), strict=True)) | {"x": x.grad}
    rows = []
    for name, rule in RULES.items():
        others = [by_autograd[name], *([of_kernels[name]] if name in of_kernels else [])]
        differences = [f"{(by_hand[name] - other).abs().max():.0e}" for other in others]
        shape = " x ".join(map(str, by_hand[name].shape)) or "1"
        rows.append((name, shape, rule, *differences, *[""] * (2 - len(differences))))
    columns = ("value", "shape", "gradient by hand", "autograd", "kernels")
    show_table("Backpropagation from the loss to the image, and by how much others differ", columns, rows)
    show_table("The graph that autograd keeps for the kernels", ("node", "passes gradients on to"), graph)


def walked(start: Any, names: dict[Tensor, str]) -> list[tuple[str, str]]:
    """The nodes of autograd's graph that can be reached from ``start``, and what each leads to."""

    def name_of(node: Any) -> str:
        if hasattr(node, "variable"):
            return names[node.variable]
        return node.name().split("::")[-1].rstrip(">")  # without the namespaces of C++

    rows, seen, left = [], set(), [start]
    while left:
        node = left.pop(0)
        if node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        following = [found for found, _ in node.next_functions if found is not None]
        rows.append((name_of(node), ", ".join(map(name_of, following))))
        left += following
    return rows


def sgd(
    model: torch.nn.Module,
    examples: Examples,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
) -> list[float]:
    """Minibatch gradient descent; the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    epochs_of_batches = (data.shuffled_batches(*examples, batch_size, generator) for _ in range(epochs))
    return descend(model, optimizer, itertools.chain.from_iterable(epochs_of_batches))


def fifty_by_heart(split: data.Split, epochs: int) -> None:
    """What can learn should be able to learn 50 digits completely."""
    few = split.train_images[:50], split.train_labels[:50]
    networks: dict[str, Callable[[], torch.nn.Module]] = {
        "linear": lambda: models.LinearClassifier(PIXELS),
        "two layers, 100": lambda: models.TwoLayerNet(PIXELS),
        "four layers, 100 each": lambda: models.MLP(PIXELS, (100, 100, 100)),
        "two layers, 2": lambda: models.TwoLayerNet(PIXELS, 2),
    }
    rows = []
    for name, build in networks.items():
        torch.manual_seed(0)
        model = build()
        before = accuracy(model, *few)
        losses = sgd(model, few, epochs, batch_size=25)
        rows.append((name, before, losses[0], losses[-1], accuracy(model, *few)))
    columns = ("hidden sizes", "before", "first loss", "last loss", "learnt")
    show_table(f"50 digits, {epochs} epochs: share that is right before and after", columns, rows)


def minibatches(split: data.Split, epochs: int, output: Path) -> None:
    """The same passes over the training set in steps of several sizes, from the same weights at the same rate."""
    examples = split.train_images, split.train_labels
    figure, axis = plot(f"Minibatch gradient descent, {epochs} epochs", "examples seen", "training loss of the batch")
    rows = []
    for batch_size in (8, 32, 128, len(examples[1])):
        torch.manual_seed(0)
        model = models.TwoLayerNet(PIXELS)
        likeness = agreement(model, examples, batch_size)
        losses = sgd(model, examples, epochs, batch_size, momentum=0.0)
        with torch.no_grad():
            loss = cross_entropy(model(examples[0]), examples[1]).item()
        right = accuracy(model, split.test_images, split.test_labels)
        rows.append((batch_size, likeness, len(losses), loss, right))
        seen = [batch_size * (step + 1) for step in range(len(losses))]
        axis.plot(
            seen, losses, linewidth=0.8, marker="o" if len(losses) < 20 else None, label=f"batches of {batch_size}"
        )
    columns = ("batch size", "cosine with whole gradient", "steps", "training loss", "test accuracy")
    show_table(f"Minibatches, {epochs} epochs each", columns, rows)
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    save_figure(figure, output / "minibatches.png")


def agreement(model: torch.nn.Module, examples: Examples, batch_size: int) -> float:
    """Mean cosine between the gradients of ten batches and that of all examples."""

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(model(images), labels)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    whole = gradient(*examples)
    chosen = [torch.randperm(len(examples[1]))[:batch_size] for _ in range(10)]
    batches = [gradient(examples[0][rows], examples[1][rows]) for rows in chosen]
    return torch.stack([cosine_similarity(part, whole, 0) for part in batches]).mean().item()


def sizes(split: data.Split, epochs: int) -> None:
    """Networks of several depths and widths on all digits."""
    networks: dict[str, Callable[[], torch.nn.Module]] = {
        "linear": lambda: models.LinearClassifier(PIXELS),
        "two layers without a bend": lambda: models.MLP(PIXELS, (100,), activation=torch.nn.Identity),
        "two layers, 5 hidden": lambda: models.TwoLayerNet(PIXELS, 5),
        "two layers, 100 hidden": lambda: models.TwoLayerNet(PIXELS),
        "two layers, 1000 hidden": lambda: models.TwoLayerNet(PIXELS, 1000),
        "three layers": lambda: models.MLP(PIXELS),
        "five layers": lambda: models.MLP(PIXELS, (100,) * 4),
    }
    rows = []
    for name, build in networks.items():
        torch.manual_seed(0)
        model = build()
        sgd(model, (split.train_images, split.train_labels), epochs)
        fits = accuracy(model, split.train_images, split.train_labels)
        right = accuracy(model, split.test_images, split.test_labels)
        rows.append((name, f"{sum(p.numel() for p in model.parameters()):,}", fits, right))
    show_table(f"Digits, {epochs} epochs", ("", "parameters", "training accuracy", "test accuracy"), rows)


def regions(steps: int, output: Path) -> None:
    """What a linear classifier and networks with one hidden layer make of a spiral."""
    torch.manual_seed(0)
    points, labels = spiral(100, noise=0.2)
    networks: dict[str, torch.nn.Module] = {"linear": models.LinearClassifier(2, 3)}
    networks |= {f"two layers, {count} hidden": models.TwoLayerNet(2, count, 3) for count in (4, 16, 100)}
    classifiers, rows = {}, []
    for name, model in networks.items():

        def loss(points: Tensor, labels: Tensor, model: Any = model) -> Tensor:
            return cross_entropy(model(points), labels)

        fit(name, steps, lambda: (points, labels), [(loss, learnt(model))], 3e-2)
        right = accuracy(model, points, labels)
        rows.append((name, sum(parameter.numel() for parameter in model.parameters()), right))
        classifiers[f"{name}: {right:.0%}"] = lambda plane, model=model: model(plane).argmax(1)
    show_table("A spiral with three arms", ("", "parameters", "accuracy on its points"), rows)
    save_regions(output / "regions.png", classifiers, points, labels)


def main() -> None:
    options = arguments("lecture_04", __doc__)
    split = data.load_digits(0)
    heart, epochs, steps = (20, 2, 100) if options.fast else (60, 20, 1000)
    backpropagation(split)
    fifty_by_heart(split, heart)
    minibatches(split, epochs, options.output)
    sizes(split, epochs)
    regions(steps, options.output)


if __name__ == "__main__":
    main()
