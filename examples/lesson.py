"""What lessons share: arguments, short training runs, tables and pictures."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dlkernels import functional, train, visualize
from dlkernels.data import END, PADDING, START, UNKNOWN
from dlkernels.models import decoding
from dlkernels.models.decoding import SequenceModel

console = Console()


def arguments(name: str, doc: str | None) -> argparse.Namespace:
    """The options of a lesson: ``fast``, and ``output``, a folder, which is made.

    One thread serves: networks so small gain nothing from more.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=inspect.cleandoc(doc or "").split("\n")[0])
    parser.add_argument("--fast", action="store_true", help="a few seconds, in which less is learnt")
    parser.add_argument("--output", type=Path, default=Path("runs") / name, help="folder of the pictures")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def fit(
    title: str,
    steps: int,
    batch: Callable[[], Sequence[Tensor]],
    players: Sequence[tuple[Callable[..., Tensor], Sequence[torch.nn.Parameter]]],
    learning_rate: float = 5e-3,
    update: Callable[[], None] = lambda: None,
    clip_norm: float | None = None,
) -> list[float]:
    """Lowers the loss of each of ``players`` in turns, by its parameters, with AdamW whose rate falls on a cosine.

    Gradients longer than ``clip_norm`` are shortened to it. Returns the first player's loss before each step.
    """
    optimizers = [torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-2) for _, parameters in players]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    values = []
    for _ in track(range(steps), f"{title:<24}", console=console, transient=True, disable=not console.is_terminal):
        examples = batch()
        for (loss, parameters), optimizer, schedule in zip(players, optimizers, schedules, strict=True):
            value = loss(*examples)
            optimizer.zero_grad()
            value.backward()
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            schedule.step()
            values.append(value.item())
        update()
    return values[:: len(players)]


def trained(title: str, recipe: train.Recipe) -> train.Trainer:
    """The trainer of a recipe, all of whose steps it has taken."""
    trainer = train.prepare(recipe)
    show = {"console": console, "transient": True, "disable": not console.is_terminal}
    for _ in track(trainer.run(), f"{title:<24}", trainer.steps, **show):
        pass
    return trainer


def learnt(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that gradients move."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def drawn(*columns: Tensor, count: int = 128) -> Callable[[], tuple[Tensor, ...]]:
    """Batches of ``count`` rows of the columns, images alone or images and their classes, at random."""

    def batch() -> tuple[Tensor, ...]:
        chosen = torch.randint(len(columns[0]), (count,))
        return tuple(column[chosen] for column in columns)

    return batch


def descend(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, ...]]
) -> list[float]:
    """A step of the optimiser on the cross-entropy of each batch of images and classes; the loss of each."""
    losses = []
    model.train()
    for images, labels in batches:
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are recognised, in evaluation mode."""
    return (model.eval()(images).argmax(1) == labels).double().mean().item()


def spiral(count: int, noise: float, arms: int = 3) -> tuple[Tensor, Tensor]:
    """Points ``[arms * count, 2]`` on arms that wind around the origin, and the arm of each."""
    radius = torch.linspace(0.05, 1, count).repeat(arms)
    labels = torch.arange(arms).repeat_interleave(count)
    angle = 2 * math.pi * labels / arms + 4 * radius + noise * torch.randn(arms * count)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), labels


def exact(model: SequenceModel, context: Tensor, expected: Tensor) -> float:
    """Share of the sequences ``[N, T]`` that a model writes exactly as expected, given what they are about."""
    written = decoding.greedy(model, context, max_length=expected.shape[1])
    written = torch.nn.functional.pad(written, (0, expected.shape[1] - written.shape[1]), value=PADDING)
    return (written == expected).all(1).double().mean().item()


# What :func:`copy_or_reverse` orders, and how many symbols it has: the special ones, the two orders, and ten letters.
COPY, REVERSE = UNKNOWN + 1, UNKNOWN + 2
SYMBOLS = REVERSE + 11


def copy_or_reverse(count: int, order: int | None = None) -> tuple[Tensor, Tensor]:
    """Three to six letters after an order, ``[N, 7]``, and the answers between start and end symbol, ``[N, 8]``.

    The order is drawn for each, or the same for all where it is given.
    """
    orders = torch.randint(COPY, REVERSE + 1, (count, 1)) if order is None else torch.full((count, 1), order)
    lengths = torch.randint(3, 7, (count, 1))
    positions = torch.arange(6).expand(count, -1)
    letters = torch.randint(REVERSE + 1, SYMBOLS, (count, 6)).masked_fill(positions >= lengths, PADDING)
    backwards = letters.gather(1, (lengths - 1 - positions).clamp(min=0)).masked_fill(positions >= lengths, PADDING)
    answers = torch.where(orders == COPY, letters, backwards)
    targets = torch.nn.functional.pad(answers, (1, 1), value=PADDING)
    targets[:, 0] = START
    return torch.cat([orders, letters], 1), targets.scatter(1, lengths + 1, END)


def longest_pair(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of the longest sequence alone."""
    row = (targets != PADDING).sum(1).argmax()
    return sources[row : row + 1], targets[row : row + 1]


def symbols(tokens: Tensor) -> list[str]:
    """The symbols of one row of :func:`copy_or_reverse` to read, without padding."""
    names = {START: "start", END: "end", COPY: "copy", REVERSE: "reverse"}
    return [names.get(token, chr(token - REVERSE - 1 + ord("a"))) for token in tokens.tolist() if token != PADDING]


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; numbers to three places."""
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else escape(str(cell)) for cell in row))
    console.print(table)


def show_weights(axis: Axes, weights: Tensor, queries: Sequence[str], keys: Sequence[str], title: str) -> None:
    """Shows attention weights ``[L, S]`` of named queries and keys, from white for 0 to black for 1."""
    axis.imshow(weights.detach(), cmap="Greys", vmin=0, vmax=1)
    axis.set_xticks(range(len(keys)), keys, fontsize=8, rotation=90 if max(map(len, keys)) > 2 else 0)
    axis.set_yticks(range(len(queries)), queries, fontsize=8)
    axis.set_title(title, fontsize=9)


def save_pictures(path: Path, rows: dict[str, Tensor]) -> None:
    """Writes a PNG with a row of images ``[N, 1 or 3, H, W]`` for each title; grey ones from their least to their
    greatest value."""
    figure, axes = plt.subplots(len(rows), figsize=(12, 1.3 * len(rows)), squeeze=False)
    for axis, (title, images) in zip(axes[:, 0], rows.items(), strict=True):
        framed = torch.nn.functional.pad(images.detach(), (0, 1, 0, 0), value=images.max().item())
        strip = torch.cat(list(framed), 2).permute(1, 2, 0)  # [H, N * (W + 1), 1 or 3]
        axis.imshow(strip.squeeze(2), cmap="gray")
        axis.set_title(title, loc="left", fontsize=8)
        axis.axis("off")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, says so, and closes it."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    visualize.save(figure, path)
    plt.close(figure)
    console.print(f"wrote {path}", highlight=False)


def save_regions(
    path: Path, classifiers: dict[str, Callable[[Tensor], Tensor]], points: Tensor, labels: Tensor
) -> None:
    """Writes a PNG with a map for each title: the classes that its classifier gives the plane, under ``points``
    ``[N, 2]`` in the colours of their ``labels``."""
    figure, axes = visualize.figures.grid(1, len(classifiers), "Decision regions", 3.2, 3.3)
    (left, bottom), (right, top) = (points.amin(0) - 0.1).tolist(), (points.amax(0) + 0.1).tolist()
    x, y = torch.meshgrid(torch.linspace(left, right, 200), torch.linspace(bottom, top, 200), indexing="xy")
    colours = {"cmap": "tab10", "vmin": 0, "vmax": 9}
    for axis, (title, classify) in zip(axes[0], classifiers.items(), strict=True):
        with torch.no_grad():
            classes = classify(torch.stack([x.flatten(), y.flatten()], 1)).view(x.shape)
        axis.imshow(classes, origin="lower", extent=(left, right, bottom, top), alpha=0.4, **colours)
        axis.scatter(*points.T, c=labels, s=9, edgecolors="white", linewidths=0.3, **colours)
        axis.set_title(title, fontsize=9)
    save_figure(figure, path)


def panels(rows: int, columns: int, title: str, width: float = 3.0, height: float = 2.5) -> tuple[Figure, Any]:
    """A figure with a title, and ``[rows, columns]`` axes with a light grid, of the given size in inches each."""
    figure, axes = visualize.figures.grid(rows, columns, title, width, height)
    for axis in axes.flat:
        axis.set_axis_on()
        axis.grid(alpha=0.3)
        axis.tick_params(which="both", labelsize=7)
    return figure, axes
