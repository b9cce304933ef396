"""Lecture 7: what norms average over, and how optimisers turn a gradient into a step.

Batch, layer, instance and group norm compute the same formula and differ in which numbers share a mean and a variance;
only batch norm lets the examples of a batch see each other. Optimisers all start from the gradient: momentum averages
it, AdaGrad and RMSProp divide it by its usual size, Adam does both, AdamW keeps weight decay out of that. Each rule is
written out in a few lines, held against torch.optim, followed through a narrow valley, and given a network to train.

The standard form differs from the lecture's in this:

- Batch norm's statistics are 1 x C x 1 x 1, over N, H and W.
- Group norm with one group is layer norm, with as many groups as channels instance norm: until it comes to weights and
  biases, of which layer norm has one for each number and group norm one for each channel.
- Nesterov's gradient is that of the place where momentum leads. In the form that is computed the weights are that place
  already, and the step is lr * (gradient + rho * velocity).
- Adam's second beta is 0.999; both averages are divided by 1 - beta ** step, since they start at zero.
- An L2 penalty in Adam is divided by the size of the gradient as well: weights with large gradients hardly decay.
  AdamW decays all alike.
- A step of the second order is minus the inverse Hessian times the gradient.

Run it: ``python examples/lecture_07_normalisation_and_optimisers.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lesson import accuracy, arguments, console, descend, drawn, panels, save_figure, show_table
from rich.progress import track
from torch import Tensor

from dlkernels import data, models, nn
from dlkernels.models.blocks import conv_norm_activation
from dlkernels.train import OPTIMIZERS, Settings
from dlkernels.train.optimizers import make_optimizer

Examples = tuple[Tensor, Tensor]

# ---- Norms -----------------------------------------------------------------------------------------------------------

GROUPS = 3
# What a norm averages over, and torch's or ours, for images of C channels; weights are one, biases zero.
NORMS: dict[str, tuple[str, Callable[[int], torch.nn.Module]]] = {
    "batch": ("N, H, W", nn.BatchNorm2d),
    "layer": ("C, H, W", lambda channels: torch.nn.GroupNorm(1, channels)),
    "instance": ("H, W", lambda channels: torch.nn.InstanceNorm2d(channels, affine=True)),
    f"group, G = {GROUPS}": ("C / G, H, W", lambda channels: torch.nn.GroupNorm(GROUPS, channels)),
}


def normalised(x: Tensor, dimensions: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """Any norm: the mean over ``dimensions`` becomes 0, the variance 1; and the shape of both."""
    mean = x.mean(dimensions, keepdim=True)
    variance = x.var(dimensions, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt(), list(mean.shape)


def norms(output: Path) -> None:
    """Each norm by hand, what shares its statistics, and group norm at its limits."""
    x = 2 * torch.randn(4, 6, 5, 5) + 1  # [N, C, H, W]
    grouped = x.unflatten(1, (GROUPS, -1))  # [N, G, C / G, H, W]
    by_hand = {
        "batch": normalised(x, (0, 2, 3)),
        "layer": normalised(x, (1, 2, 3)),
        "instance": normalised(x, (2, 3)),
        f"group, G = {GROUPS}": normalised(grouped, (2, 3, 4)),
    }
    figure, axes = panels(
        1, len(NORMS), "Numbers of one colour share a mean and a variance, with all of H and W", 2.6, 2.0
    )
    rows = []
    for axis, (name, (over, make)) in zip(axes[0], NORMS.items(), strict=True):
        found, shape = by_hand[name]
        difference = (found.view_as(x) - make(6)(x)).abs().max().item()
        alone = (make(6)(x[:2])[0] - make(6)(x)[0]).abs().max().item()
        rows.append((name, over, shape, f"{difference:.0e}", "yes" if alone > 1e-3 else "no"))
        numbers = torch.arange(math.prod(shape)).view(shape)  # of the means
        sharing = numbers.expand_as(found).reshape(x.shape)[:, :, 0, 0]  # [N, C]
        axis.imshow(sharing, cmap="tab20" if sharing.max() < 20 else "nipy_spectral")
        axis.grid(False)
        axis.set(xlabel="channel", ylabel="example", xticks=range(6), yticks=range(4))
        axis.set_title(f"{name}: {int(sharing.max()) + 1} means", fontsize=9)
    columns = ("norm", "averages over", "shape of its statistics", "difference by hand", "sees other examples")
    show_table("Norms of [N, C, H, W] = [4, 6, 5, 5]", columns, rows)
    limits = {
        "G = 1 and layer norm": (torch.nn.GroupNorm(1, 6)(x), torch.nn.LayerNorm([6, 5, 5])(x)),
        "G = C and instance norm": (torch.nn.GroupNorm(6, 6)(x), torch.nn.InstanceNorm2d(6)(x)),
        f"G = {GROUPS} and layer norm": (torch.nn.GroupNorm(GROUPS, 6)(x), torch.nn.LayerNorm([6, 5, 5])(x)),
    }
    shown = [(name, f"{(one - other).abs().max().item():.0e}") for name, (one, other) in limits.items()]
    show_table("Group norm at its limits", ("", "largest difference"), shown)
    save_figure(figure, output / "norms.png")


def small_batches(split: data.Split, seen: int, seeds: int) -> None:
    """Test accuracy of a network with each norm after so many examples, in batches of several sizes."""

    def trained(norm: Callable[[int], torch.nn.Module], size: int, seed: int) -> float:
        torch.manual_seed(seed)
        blocks = [
            conv_norm_activation(*channels, stride=2, activation=torch.nn.ReLU, norm_layer=norm, layers=nn)
            for channels in ((1, 12), (12, 24))
        ]
        model = torch.nn.Sequential(*blocks, torch.nn.Flatten(), nn.Linear(24 * 4, 10))
        optimizer = torch.optim.SGD(model.parameters(), 0.002 * size, momentum=0.9)
        batch = drawn(split.train_images, split.train_labels, count=size)
        descend(model, optimizer, (batch() for _ in range(seen // size)))
        return accuracy(model, split.test_images, split.test_labels)

    sizes, rows = (2, 8, 32), []
    for name, (_, norm) in track(
        NORMS.items(), "norms", console=console, transient=True, disable=not console.is_terminal
    ):
        means = [statistics.mean(trained(norm, size, seed) for seed in range(seeds)) for size in sizes]
        rows.append((name, *means))
    columns = ("norm", *(f"batches of {size}" for size in sizes))
    show_table(f"Test accuracy on digits after {seen} examples, mean over {seeds} seeds", columns, rows)


# ---- Rules -----------------------------------------------------------------------------------------------------------

RATE, RHO, BETA, DECAY = 0.1, 0.9, 0.999, 0.01  # RHO is the first beta of Adam too
State = dict[str, Any]  # what a rule remembers; empty at first
Rule = Callable[[Tensor, Tensor, State, int], Tensor]  # weights, gradient, state, step from 1 to the weights after it


def sgd(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    return w - RATE * g


def momentum(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    state["v"] = RHO * state.get("v", 0) + g
    return w - RATE * state["v"]


def nesterov(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    state["v"] = RHO * state.get("v", 0) + g
    return w - RATE * (g + RHO * state["v"])


def adagrad(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    state["s"] = state.get("s", 0) + g**2
    return w - RATE * g / (state["s"].sqrt() + 1e-10)


def rmsprop(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    state["s"] = 0.99 * state.get("s", 0) + 0.01 * g**2
    return w - RATE * g / (state["s"].sqrt() + 1e-8)


def adam(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    state["m"] = RHO * state.get("m", 0) + (1 - RHO) * g
    state["s"] = BETA * state.get("s", 0) + (1 - BETA) * g**2
    mean, square = state["m"] / (1 - RHO**step), state["s"] / (1 - BETA**step)
    return w - RATE * mean / (square.sqrt() + 1e-8)


def adam_with_l2(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    return adam(w, g + DECAY * w, state, step)


def adamw(w: Tensor, g: Tensor, state: State, step: int) -> Tensor:
    return adam(w - RATE * DECAY * w, g, state, step)


# And torch's, as ``dlkernels train --optimizer`` has them.
RULES: dict[str, tuple[Rule, str, float]] = {
    "SGD": (sgd, "sgd", 0.0),
    "momentum": (momentum, "momentum", 0.0),
    "Nesterov": (nesterov, "nesterov", 0.0),
    "AdaGrad": (adagrad, "adagrad", 0.0),
    "RMSProp": (rmsprop, "rmsprop", 0.0),
    "Adam": (adam, "adam", 0.0),
    "Adam with L2": (adam_with_l2, "adam", DECAY),
    "AdamW": (adamw, "adamw", DECAY),
}


def rules(steps: int = 50) -> None:
    """How far weights are from torch's after steps on a loss with a curved valley."""

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        loss = (w[1:] - w[:-1] ** 2).square().sum() + (1 - w).square().sum()
        (found,) = torch.autograd.grad(0.02 * loss, w)
        return found

    start, rows = torch.randn(6, 1, dtype=torch.float64) / 2, []
    for name, (rule, torchs, decay) in RULES.items():
        ours, parameter = start.clone(), torch.nn.Parameter(start.clone())
        settings = Settings(optimizer=torchs, learning_rate=RATE, momentum=RHO, weight_decay=decay)
        optimizer, state = make_optimizer([parameter], settings), {}
        for step in range(1, steps + 1):
            ours = rule(ours, gradient(ours), state, step)
            parameter.grad = gradient(parameter)
            optimizer.step()
        moved = (parameter - start).abs().max().item()
        rows.append((name, " ".join(state) or "nothing", moved, f"{(ours - parameter).abs().max().item():.0e}"))
    columns = ("rule", "remembers", "weights moved by", "difference from torch.optim")
    show_table(f"Update rules by hand, {steps} steps", columns, rows)


# ---- A narrow valley -------------------------------------------------------------------------------------------------

CURVATURE = 100.0  # along one axis; 1 along the other
TURN = torch.tensor([[0.9, -math.sqrt(0.19)], [math.sqrt(0.19), 0.9]])
HESSIAN = TURN @ torch.diag(torch.tensor([1.0, CURVATURE])) @ TURN.T
START = torch.tensor([-4.0, 1.5])


def height(place: Tensor) -> Tensor:
    """A quadratic function of places ``[..., 2]`` that is 100 times as curved across as along."""
    return 0.5 * ((place @ HESSIAN) * place).sum(-1)


def path(name: str, rate: float, steps: int) -> Tensor:
    """The places that an optimiser comes through, ``[steps + 1, 2]``."""
    place = torch.nn.Parameter(START.clone())
    optimizer = make_optimizer([place], Settings(optimizer=name, learning_rate=rate, weight_decay=0.0))
    places = [START]
    for _ in range(steps):
        place.grad = HESSIAN @ place.detach()
        optimizer.step()
        places.append(place.detach().clone())
    return torch.stack(places)


def steps_needed(places: Tensor) -> int:
    """After which step the height stays below a thousandth."""
    above = (~(height(places) < 1e-3)).nonzero()
    return 1 + int(above.max())


def valley(steps: int, output: Path) -> None:
    """The path of each optimiser at its best learning rate, and the one step of Newton's method."""
    figure, axes = panels(2, 4, "Down a narrow valley, each at its best learning rate", 3.1, 2.5)
    first, second = torch.meshgrid(torch.linspace(-5, 5, 200), torch.linspace(-4, 3, 200), indexing="xy")
    heights = height(torch.stack([first, second], -1))
    found, rows = {}, []
    for name in OPTIMIZERS:
        if name == "adamw":
            continue  # without decay it is adam
        rates = [10 ** (power / 6) for power in range(-15, 7)]
        rate = min(rates, key=lambda rate, name=name: steps_needed(path(name, rate, steps)))
        found[name] = path(name, rate, steps)
        needed = steps_needed(found[name])
        rows.append((name, f"{rate:.3f}", needed if needed <= steps else f"more than {steps}"))
    gradient = torch.func.grad(height)(START)
    hessian = torch.func.hessian(height)(START)
    newton = START - torch.linalg.solve(hessian, gradient)
    found["Newton"] = torch.stack([START, newton])
    rows.append(("Newton", "none", steps_needed(found["Newton"])))
    for axis, (name, places) in zip(axes.flat, found.items(), strict=False):
        axis.contour(first, second, heights, levels=[4.0**power for power in range(-3, 6)], linewidths=0.5, cmap="gray")
        axis.plot(*places.T, ".-", markersize=3, linewidth=1)
        axis.plot(0, 0, "*", color="red")
        axis.set(xlim=(-5, 5), ylim=(-4, 3))
        axis.set_title(name, fontsize=9)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    show_table("A narrow valley", ("optimiser", "best rate", "steps until the height stays below 0.001"), rows)
    weights = sum(parameter.numel() for parameter in models.LeNet(8).parameters())
    memory = f"{4 * weights**2 / 1e9:.0f} GB"
    console.print(f"The Hessian of a LeNet for digits, {weights} weights, would take {memory}.", highlight=False)
    save_figure(figure, output / "paths.png")


# ---- One network, every optimiser ------------------------------------------------------------------------------------

RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.03, 0.1, 0.3),
    "momentum": (0.01, 0.03, 0.1),
    "nesterov": (0.01, 0.03, 0.1),
    "adagrad": (0.003, 0.01, 0.03),
    "rmsprop": (0.0003, 0.001, 0.003),
    "adam": (0.001, 0.003, 0.01),
    "adamw": (0.001, 0.003, 0.01),
}


def every_optimiser(steps: int, output: Path) -> None:
    """The same LeNet trained with each; validation chooses among three learning rates, the test part is seen once."""
    parts = data.load("digits")
    train, validation, test = (
        parts.batch(part, torch.arange(len(part[0]))) for part in (parts.train, parts.validation, parts.test)
    )
    criterion = nn.CrossEntropyLoss()
    figure, axes = panels(1, 1, "LeNet on digits, each optimiser at its best of three rates", 7.0, 4.2)
    rows = []
    for name, rates in track(RATES.items(), "LeNet", console=console, transient=True, disable=not console.is_terminal):
        runs = []
        for rate in rates:
            torch.manual_seed(0)
            model = models.LeNet(8)
            decay = 0.01 if name == "adamw" else 0.0
            settings = Settings(optimizer=name, learning_rate=rate, weight_decay=decay)
            batch = drawn(*train, count=64)
            losses = descend(model, make_optimizer(model.parameters(), settings), (batch() for _ in range(steps)))
            with torch.no_grad():
                validated = criterion(model.eval()(validation[0]), validation[1]).item()
            runs.append((validated, rate, losses, model))
        validated, rate, losses, model = min(runs, key=lambda run: run[0])
        smooth = torch.tensor(losses).unfold(0, min(10, steps), 1).mean(1)
        axes[0, 0].plot(range(steps - len(smooth) + 1, steps + 1), smooth, label=f"{name}, {rate:g}")
        below = next((step for step, loss in enumerate(smooth.tolist(), 10) if loss < 0.3), None)
        rows.append((name, f"{rate:g}", below or "never", validated, accuracy(model, test[0], test[1])))
    axes[0, 0].set(yscale="log", xlabel="step", ylabel="training loss, mean over ten steps")
    axes[0, 0].legend(fontsize=8)
    columns = ("optimiser", "rate", "steps to a loss of 0.3", "validation loss", "test accuracy")
    show_table(f"One network, {steps} steps with each optimiser", columns, rows)
    save_figure(figure, output / "curves.png")


# ---- Decay -----------------------------------------------------------------------------------------------------------


def decay(steps: int, output: Path) -> None:
    """Weights that start at one and get nothing but noise for a gradient, of five sizes: what decay leaves of them."""
    rate, strength, scales = 1e-3, 0.1, torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0])
    expected = [(1 - rate * strength) ** step for step in range(steps + 1)]
    figure, axes = panels(1, 2, "Mean of weights whose gradient is noise of the given size", 4.5, 3.4)
    columns: dict[str, list[float]] = {}
    for axis, (title, name) in zip(axes[0], {"Adam with an L2 penalty": "adam", "AdamW": "adamw"}.items(), strict=True):
        torch.manual_seed(0)
        weights = torch.nn.Parameter(torch.ones(len(scales), 2000))
        settings = Settings(optimizer=name, learning_rate=rate, weight_decay=strength)
        optimizer, means = make_optimizer([weights], settings), [torch.ones(len(scales))]
        for _ in range(steps):
            weights.grad = scales[:, None] * torch.randn_like(weights)
            optimizer.step()
            means.append(weights.detach().mean(1))
        for scale, curve in zip(scales, torch.stack(means, 1), strict=True):
            axis.plot(curve, label=f"{scale:g}")
        axis.plot(expected, "k--", label=r"$(1 - lr \cdot \lambda)^{step}$", linewidth=1)
        axis.set(xlabel="step", ylabel="mean weight", ylim=(-0.05, 1.05))
        axis.set_title(title, fontsize=9)
        columns[title] = means[-1].tolist()
    axes[0, 1].legend(fontsize=7, title="size of the noise", title_fontsize=7)
    rows = [(f"{scale:g}", *left, expected[-1]) for scale, *left in zip(scales, *columns.values(), strict=True)]
    show_table(
        f"What {steps} steps of decay leave of a weight of 1",
        ("size of its gradient", *columns, "(1 - lr * decay) ** steps"),
        rows,
    )
    save_figure(figure, output / "decay.png")


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_07", __doc__)
    torch.manual_seed(0)
    norms(options.output)
    small_batches(data.load_digits(0), *((64, 1) if options.fast else (1600, 3)))
    rules()
    valley(20 if options.fast else 400, options.output)
    every_optimiser(5 if options.fast else 200, options.output)
    decay(50 if options.fast else 1500, options.output)


if __name__ == "__main__":
    main()
