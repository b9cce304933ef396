"""Lecture 6: activations, data and first weights, such that a signal reaches the last layer and a gradient the first.

A gradient is a product with a factor for each layer, and a signal on its way up too: a deep network learns only where
these factors stay near one. The activation has its share in them, the first weights have the rest, and batch norm puts
right what both got wrong. The data is prepared for the same reason: pixels of one size, around zero, and not saying the
same thing twice.

The standard form differs from the lecture's in this:

- 1 / sqrt(fan_in), which the notes call Xavier, is LeCun's rule. Glorot's (Xavier's) is sqrt(2 / (fan_in + fan_out)),
  between what the signal and what the gradient would have; the two are one where layers are as wide as each other.
- The fan-in of a convolution is C * kh * kw, all that one output is a sum of.
- Batch norm has a mean and a variance for each channel, 1 x C x 1 x 1, over N, H and W. The epsilon is inside the root;
  the running variance is the unbiased one, divided by one less than what it is over.
- ELU, SELU, Maxout, Swish and GELU have formulas: activations.png has them, with those of the others.
- Mean, deviations and principal axes are those of the training images, for test images too.
- Whitening divides by what may be noise, or zero: only the axes that hold 99 % of the variance are kept. Even so what
  is learnt fastest then is not what is recognised best.

Run it: ``python examples/lecture_06_activations_and_initialisation.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from lesson import accuracy, arguments, console, drawn, panels, save_figure, save_pictures, show_table
from rich.progress import track
from sklearn.decomposition import PCA
from torch import Tensor

from dlkernels import data, models, nn

# ---- Activations -----------------------------------------------------------------------------------------------------


def three_pieces() -> torch.nn.Module:
    """A maxout of one number: the largest of three lines, which a network would learn."""
    module = nn.Maxout(1, 1, pieces=3)
    with torch.no_grad():
        module.linear.weight.copy_(torch.tensor([[-1.0], [0.2], [1.5]]))
        module.linear.bias.copy_(torch.tensor([-1.0, 0.0, -1.5]))
    return module


ACTIVATIONS: dict[str, tuple[torch.nn.Module, str]] = {
    "sigmoid": (torch.nn.Sigmoid(), r"$\sigma(x) = 1 / (1 + e^{-x})$"),
    "tanh": (torch.nn.Tanh(), r"$(e^x - e^{-x}) / (e^x + e^{-x})$"),
    "ReLU": (torch.nn.ReLU(), r"$\max(0, x)$"),
    "Leaky ReLU": (torch.nn.LeakyReLU(0.1), r"$\max(0.1 x, x)$"),
    "PReLU": (torch.nn.PReLU(init=0.25), r"$\max(a x, x)$, $a$ learnt, at first 0.25"),
    "ELU": (torch.nn.ELU(), r"$x$, below 0 $\alpha (e^x - 1)$, $\alpha = 1$"),
    "SELU": (torch.nn.SELU(), r"1.0507 ELU$(x)$, $\alpha = 1.6733$"),
    "Maxout": (three_pieces(), r"$\max(w_1 x + b_1, w_2 x + b_2, w_3 x + b_3)$"),
    "Swish": (torch.nn.SiLU(), r"$x \, \sigma(x)$"),
    "GELU": (torch.nn.GELU(), r"$x \, \Phi(x)$, $\Phi$ of the normal distribution"),
}


def with_derivative(function: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A function of single numbers, and its derivative, at ``x`` ``[N]``."""
    x = x.clone().requires_grad_()
    value = function(x.unsqueeze(1)).squeeze(1)
    (derivative,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), derivative


def activations(output: Path) -> None:
    """Curves and derivatives of all, and what becomes of normally distributed numbers."""
    figure, axes = panels(2, 5, "Activations and their derivatives", 2.9, 2.4)
    x, inputs = torch.linspace(-4, 4, 401), torch.randn(20000)
    rows = []
    for axis, (name, (function, formula)) in zip(axes.flat, ACTIVATIONS.items(), strict=True):
        value, derivative = with_derivative(function, x)
        axis.plot(x, value, label="value")
        axis.plot(x, derivative, "--", label="derivative")
        axis.set(ylim=(-1.9, 4.1))
        axis.set_title(f"{name}: {formula}", fontsize=7.5)
        outputs, _ = with_derivative(function, inputs)
        _, wide = with_derivative(function, 3 * inputs)
        blocked = (wide.abs() < 0.05).double().mean().item()
        rows.append((name, outputs.mean().item(), outputs.std().item(), blocked))
    axes[0, 0].legend(fontsize=7, loc="upper left")
    columns = ("", "mean", "deviation", "derivatives below 0.05 (inputs with deviation 3)")
    show_table("What activations make of inputs with mean 0 and deviation 1", columns, rows)
    save_figure(figure, output / "activations.png")


# ---- Data ------------------------------------------------------------------------------------------------------------


def cloud(output: Path) -> None:
    """Four ways to prepare points in a plane, and that whitening is three lines of linear algebra."""
    points = torch.randn(500, 2).double() @ torch.tensor([[2.0, 1.2], [0.0, 0.5]]).double() + torch.tensor([2.5, 1.5])
    centred = points - points.mean(0)
    prepared = {
        "as it is": points,
        "zero mean": centred,
        "normalised": centred / points.std(0),
        "PCA: along its own axes": torch.from_numpy(PCA().fit_transform(points.numpy())),
        "whitened": torch.from_numpy(PCA(whiten=True).fit_transform(points.numpy())),
    }
    figure, axes = panels(1, 5, "One cloud, prepared in five ways", 2.6, 2.6)
    rows = []
    for axis, (name, found) in zip(axes[0], prepared.items(), strict=True):
        axis.scatter(*found.T, s=3)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(xlim=(-9, 9), ylim=(-9, 9), xticks=range(-8, 9, 4), yticks=range(-8, 9, 4), aspect="equal")
        axis.set_title(name, fontsize=9)
        mean, deviation, correlation = found.mean(0), found.std(0), torch.corrcoef(found.T)[0, 1].item()
        cells = [" ".join(f"{number:.2f}" for number in pair) for pair in (mean.tolist(), deviation.tolist())]
        rows.append((name, *cells, f"{correlation:.2f}"))
    show_table("A cloud of points", ("", "means", "deviations", "correlation"), rows)

    _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
    by_hand = centred @ directions.T / (lengths / math.sqrt(len(points) - 1))
    difference = (by_hand.abs() - prepared["whitened"].abs()).abs().max().item()  # an axis may point either way
    console.print(f"Whitening by hand differs from scikit-learn's by {difference:.1e} at most.", highlight=False)
    save_figure(figure, output / "cloud.png")


def digits(fast: bool, output: Path) -> None:
    """The same for images: what a linear classifier learns of each in as many steps."""
    parts = data.load("digits")
    train, test = parts.train[0].flatten(1), parts.test[0].flatten(1)  # pixels in [0, 1]
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1  # corners that no digit reaches
    axes = PCA(0.99, whiten=True, svd_solver="full").fit(train.numpy())

    def whiten(images: Tensor) -> Tensor:
        return torch.from_numpy(axes.transform(images.numpy())).float()

    preparations: dict[str, Callable[[Tensor], Tensor]] = {
        "pixels in [0, 1]": lambda images: images,
        "zero mean": lambda images: images - mean,
        "normalised": lambda images: (images - mean) / deviation,
        f"whitened, {axes.n_components_} axes": whiten,
    }
    few, many = (2, 4) if fast else (10, 100)
    rows = []
    for name, prepare in preparations.items():
        images, unseen = prepare(train), prepare(test)
        variances = torch.linalg.eigvalsh(images.T @ images).flip(0)
        condition = (variances[0] / variances[axes.n_components_ - 1]).item()
        learnt = [descend((images, parts.train[1]), (unseen, parts.test[1]), steps) for steps in (few, many)]
        rows.append((name, unseen.mean().item(), f"{condition:.0f}", *learnt[0], *learnt[1]))
    losses = (column for steps in (few, many) for column in (f"loss after {steps}", "test accuracy"))
    columns = ("", "test mean", "condition", *losses)
    show_table("Digits: a linear classifier after steps of gradient descent, at the best rate", columns, rows)
    turned_back = whiten(test[:16]) @ torch.from_numpy(axes.components_).float()
    shown = [prepare(test[:16]) for prepare in list(preparations.values())[:3]] + [turned_back]
    titles = [*list(preparations)[:3], "whitened, and turned back to pixels"]
    save_pictures(
        output / "digits.png",
        {title: images.view(-1, 1, 8, 8) for title, images in zip(titles, shown, strict=True)},
    )


def descend(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], steps: int) -> tuple[float, float]:
    """Steps on all training images at once: the smallest training loss over learning rates, and the test accuracy."""
    criterion, found = nn.CrossEntropyLoss(), []
    for power in range(-2, 5):
        torch.manual_seed(0)
        model = models.LinearClassifier(train[0].shape[1])
        optimizer = torch.optim.SGD(model.parameters(), 10 ** (power / 2))
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(model(train[0]), train[1]).backward()
            optimizer.step()
        with torch.no_grad():
            found.append((criterion(model(train[0]), train[1]).item(), accuracy(model, *test)))
    return min(found)


# ---- Initialisation --------------------------------------------------------------------------------------------------

Initialisation = Callable[[Tensor], Tensor]
INITIALISATIONS: dict[str, Initialisation] = {
    "constant 0.01": partial(torch.nn.init.constant_, val=0.01),
    "normal, 0.01": partial(torch.nn.init.normal_, std=0.01),
    "LeCun": partial(torch.nn.init.kaiming_normal_, nonlinearity="linear"),
    "Glorot": torch.nn.init.xavier_normal_,
    "Kaiming": partial(torch.nn.init.kaiming_normal_, nonlinearity="relu"),
}
DEEP: dict[str, Callable[[], torch.nn.Module]] = {
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
    "ReLU": torch.nn.ReLU,
    "SELU": torch.nn.SELU,
}
WIDTHS = [round(640 * 0.8**layer) for layer in range(11)]  # narrowing, so that LeCun's rule and Glorot's differ


def rules() -> None:
    """What deviation each rule gives the weights of a linear layer and of a convolution."""
    formulas: dict[str, tuple[str, Callable[[int, int], float]]] = {
        "LeCun": ("1 / sqrt(fan_in)", lambda fan_in, fan_out: 1 / math.sqrt(fan_in)),
        "Glorot": ("sqrt(2 / (fan_in + fan_out))", lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out))),
        "Kaiming": ("sqrt(2 / fan_in)", lambda fan_in, fan_out: math.sqrt(2 / fan_in)),
    }
    layers = [(nn.Linear(256, 128), 256, 128), (nn.Conv2d(64, 128, 3), 64 * 3 * 3, 128 * 3 * 3)]
    rows = []
    for name, (formula, deviation) in formulas.items():
        row = [f"{name}, {formula}"]
        for layer, fan_in, fan_out in layers:
            measured = INITIALISATIONS[name](layer.weight).std().item()
            row += [f"{deviation(fan_in, fan_out):.4f}", f"{measured:.4f}"]
        rows.append(row)
    title = "Deviation of weights: Linear(256, 128), fans 256 and 128; Conv2d(64, 128, 3), 576 and 1152"
    show_table(title, ("rule", "Linear", "measured", "Conv2d", "measured"), rows)


def deep_network(
    widths: list[int], activation: str, initialise: Initialisation, norm: bool = False, classes: int = 10
) -> models.MLP:
    """A hidden layer for each step between the widths, all weights drawn alike, biases at zero."""
    model = models.MLP(widths[0], widths[1:], classes, DEEP[activation], nn.BatchNorm1d if norm else None)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            initialise(module.weight)
            torch.nn.init.zeros_(module.bias)
    return model


def through(model: models.MLP, x: Tensor) -> tuple[list[Tensor], list[float]]:
    """The activations of each layer, and by how much the gradients there deviate that come from random ones at the
    last."""
    layers = []
    for module in model.hidden:
        x = module(x)
        if isinstance(module, tuple(type(make()) for make in DEEP.values())):
            x.retain_grad()
            layers.append(x)
    x.backward(torch.randn_like(x))
    return [layer.detach() for layer in layers], [layer.grad.std().item() for layer in layers if layer.grad is not None]


def spread_by_depth(output: Path) -> None:
    """How far signals and gradients deviate in each of ten layers, for each initialisation and activation."""
    figure, axes = panels(2, len(DEEP), "Deviation by layer of a deep network", 3.1, 2.7)
    histograms, cells = panels(len(INITIALISATIONS) + 1, 5, "Activations of a deep network of tanh", 2.2, 1.4)
    x = torch.randn(256, WIDTHS[0])
    choices = {name: (initialise, False) for name, initialise in INITIALISATIONS.items()}
    choices["normal, 0.01, batch norm"] = (INITIALISATIONS["normal, 0.01"], True)
    rows = []
    for number, (name, (initialise, norm)) in enumerate(choices.items()):
        row = [name]
        for column, activation in enumerate(DEEP):
            torch.manual_seed(0)
            layers, gradients = through(deep_network(WIDTHS, activation, initialise, norm), x)
            signals = [layer.std().item() for layer in layers]
            row.append(f"{signals[-1]:.0e} / {gradients[0]:.0e}")
            style = {"label": name, "marker": ".", "linestyle": "--" if norm else "-"}
            axes[0, column].plot(range(1, 11), signals, **style)
            axes[1, column].plot(range(1, 11), gradients, **style)
            axes[0, column].set_title(activation, fontsize=9)
            if name.startswith("constant") and activation == "ReLU":
                alike = (layers[-1] - layers[-1][:, :1]).abs().max().item()
                console.print(f"Equal weights make equal units: those of the last layer differ by {alike:g} at most.")
            if activation == "tanh":
                for cell, layer in zip(cells[number], range(1, 11, 2), strict=True):
                    cell.hist(layers[layer - 1].flatten(), 41, range=(-1.02, 1.02))
                    cell.set_yticks([])
                    cell.set_title(f"{name}: layer {layer}", fontsize=7)
        rows.append(row)
    for axis in axes.flat:
        axis.set(yscale="log", ylim=(1e-8, 1e3), xlabel="layer")
    axes[0, 0].set_ylabel("deviation of activations")
    axes[1, 0].set_ylabel("deviation of gradients")
    axes[0, -1].legend(fontsize=6, loc="lower left")
    show_table("Deviation of the last layer's activations / of the first layer's gradients", ("", *DEEP), rows)
    save_figure(figure, output / "spread_by_depth.png")
    save_figure(histograms, output / "histograms.png")


# ---- Batch norm, and what trains -------------------------------------------------------------------------------------


def batch_norm_by_hand() -> None:
    """Batch norm in three lines, and how far it would be off if it were done otherwise."""
    x = 3 * torch.randn(8, 4, 3, 3, dtype=torch.float64) + 1
    norm = nn.BatchNorm2d(4, eps=1e-2, momentum=1.0).double()  # the running statistics are those of the last batch
    output = norm(x).detach()
    mean = x.mean((0, 2, 3), keepdim=True)  # [1, C, 1, 1]
    variance = x.var((0, 2, 3), correction=0, keepdim=True)
    rows = [
        ("(x - mean) / sqrt(variance + eps)", (x - mean) / (variance + norm.eps).sqrt(), output),
        ("the same with eps outside the root", (x - mean) / (variance.sqrt() + norm.eps), output),
        ("running variance, unbiased", x.var((0, 2, 3)), norm.running_var),
        ("running variance, biased", variance.flatten(), norm.running_var),
    ]
    shown = [(name, f"{(ours - theirs).abs().max().item():.1e}") for name, ours, theirs in rows]
    show_table("Batch norm of [8, 4, 3, 3] by hand", ("", "largest difference"), shown)


def trained_accuracy(model: torch.nn.Module, split: data.Split, steps: int) -> float:
    """Test accuracy after steps of gradient descent with momentum, which, unlike Adam, does not rescale gradients."""
    criterion, batch = nn.CrossEntropyLoss(), drawn(split.train_images, split.train_labels, count=64)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(steps):
        images, labels = batch()
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
    return accuracy(model, split.test_images, split.test_labels)


def what_trains(split: data.Split, fast: bool) -> None:
    """Test accuracy of ten hidden layers for each initialisation and activation, without and with batch norm."""
    widths, steps = [64] * 11, 3 if fast else 300
    choices = [(name, norm) for norm in (False, True) for name in INITIALISATIONS]
    rows = []
    for name, norm in track(choices, "training", console=console, transient=True, disable=not console.is_terminal):
        row: list[object] = [f"{name}, batch norm" if norm else name]
        for activation in DEEP:
            torch.manual_seed(0)
            row.append(trained_accuracy(deep_network(widths, activation, INITIALISATIONS[name], norm), split, steps))
        rows.append(row)
    show_table(f"Test accuracy of ten hidden layers on digits after {steps} steps", ("", *DEEP), rows)


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_06", __doc__)
    torch.manual_seed(0)
    activations(options.output)
    cloud(options.output)
    digits(options.fast, options.output)
    rules()
    spread_by_depth(options.output)
    batch_norm_by_hand()
    what_trains(data.load_digits(0), options.fast)


if __name__ == "__main__":
    main()
