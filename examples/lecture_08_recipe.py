"""Lecture 8: how to train a network that nobody has trained before, and how to get a little more out of it.

The seven-step recipe is run on digits and gives a verdict for each step; then on the same network with a mistake
planted in it, which one of the first three steps finds within a second. After that: what augmentation, ensembles and
views at test time are worth with few examples, and how few a network needs for a new question that knows an old one.

The standard form differs from the lecture's sketch in this:

- Early stopping and the searches watch validation data; test data decides nothing.
- Learning rates and weight decays are drawn log-uniformly: a factor of ten is one step, wherever it is.
- Dropout zeroes activations, DropConnect weights. Both are off while the recipe overfits a few batches.
- CutMix takes as much of the label as of the pixels, counted after the rectangle was cut off at the border.
- Views at test time help where training has seen their like, and hurt where it has not.
- A frozen batch norm keeps its running statistics too, or else the features would go on changing.

Run it: ``python examples/lecture_08_recipe.py [--fast] [--output FOLDER]``; a run that was interrupted goes on with the
searches where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lesson import accuracy, arguments, console, show_table
from rich.progress import track
from torch import Tensor

from dlkernels import data, models, nn
from dlkernels.train import augment, ensemble, seven_steps, transfer
from dlkernels.train.problem import Problem

cross_entropy = nn.CrossEntropyLoss()
Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def problem_of(split: data.Split) -> Problem:
    """A LeNet that is to learn digits; a fifth of the training examples validates."""
    held_out = len(split.train_labels) // 5
    return Problem(
        build=lambda: models.LeNet(8),
        loss=cross_entropy,
        train=(split.train_images[held_out:], split.train_labels[held_out:]),
        validation=(split.train_images[:held_out], split.train_labels[:held_out]),
        num_classes=split.num_classes,
    )


def planted_defects(problem: Problem) -> None:
    """Mistakes that run without an error, and the step that finds each."""

    def dead() -> torch.nn.Module:
        model = models.LeNet(8)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        return model

    def with_problem(**changes: object) -> Problem:
        return Problem(**{**vars(problem), **changes})  # type: ignore[arg-type]

    defects = {
        "the loss is a sum": with_problem(loss=nn.CrossEntropyLoss(reduction="sum")),
        "the loss has the wrong sign": with_problem(loss=lambda logits, labels: -cross_entropy(logits, labels)),
        "all initial weights are zero": with_problem(build=dead),
        "softmax is applied twice": with_problem(loss=lambda x, y: cross_entropy(x.softmax(1), y)),
        "labels are drawn anew each time": with_problem(loss=lambda x, y: cross_entropy(x, torch.randint_like(y, 10))),
        "a learning rate of 1e3": problem,
    }
    steps = (
        seven_steps.check_initial_loss,
        seven_steps.overfit_few_batches,
        partial(seven_steps.find_learning_rate, learning_rates=(1e3,)),
    )
    rows = []
    for defect, broken in defects.items():
        verdict = next(verdict for step in steps if not (verdict := step(broken)).passed)
        rows.append((defect, verdict.step, verdict.finding))
    show_table("Planted defects", ("defect", "found in step", "verdict"), rows)


def train(
    model: torch.nn.Module,
    examples: tuple[Tensor, Tensor],
    steps: int,
    groups: Iterable[Any] | None = None,
    change: Augmentation = lambda images, labels: (images, labels),
) -> None:
    """Trains by AdamW, whose rate falls on a cosine, on batches that ``change`` augments."""
    images, labels = examples
    optimizer = torch.optim.AdamW(model.parameters() if groups is None else groups, 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (32,))
        batch, targets = change(images[chosen], labels[chosen])
        loss = cross_entropy(model(batch), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def shifted(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batch, moved by a pixel to one side or not at all."""
    return images.roll(int(torch.randint(-1, 2, ())), 3), labels


def more_from_few_examples(split: data.Split, steps: int, seeds: int) -> None:
    """Test accuracy with 100 training examples: of networks alone, over views at test time, and of all together."""
    examples = split.train_images[:100], split.train_labels[:100]
    test = split.test_images, split.test_labels
    changes: dict[str, Augmentation] = {
        "nothing": lambda images, labels: (images, labels),
        "shifts by a pixel": shifted,
        "Mixup": augment.Mixup(10),
        "CutMix": augment.CutMix(10),
        "Cutout": augment.Cutout(3),
    }
    views = [partial(torch.roll, shifts=shift, dims=3) for shift in (-1, 0, 1)]
    rows = []
    for name, change in track(
        changes.items(), "training with few", console=console, transient=True, disable=not console.is_terminal
    ):
        members = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            members.append(models.LeNet(8))
            train(members[-1], examples, steps, change=change)
        alone = statistics.mean(accuracy(member, *test) for member in members)
        viewed = statistics.mean(accuracy(ensemble.TestTimeAugmentation(member, views), *test) for member in members)
        rows.append((name, alone, viewed, accuracy(ensemble.Ensemble(members), *test)))
    title = "Test accuracy with 100 training examples"
    show_table(title, ("training with", "one network", "over 3 shifts", f"ensemble of {seeds}"), rows)


def odd_or_even(split: data.Split, steps: int, seeds: int) -> None:
    """Test accuracy of telling odd from even digits with two examples of each, from random and from known features."""
    images, labels = split.train_images, split.train_labels
    rows = []
    for name, pretrained in (("random features", False), ("features of who knows the digits", True)):
        results = []
        for seed in track(range(seeds), name, console=console, transient=True, disable=not console.is_terminal):
            torch.manual_seed(seed)
            model = models.LeNet(8)
            if pretrained:
                train(model, (images, labels), steps)
            order = torch.randperm(len(labels))
            few = torch.cat([order[labels[order] == label][:2] for label in range(10)])
            examples = images[few], labels[few] % 2
            head = transfer.replace_head(model, 2)
            with transfer.frozen(model, head):
                train(model, examples, steps, head.parameters())
            head_alone = accuracy(model, split.test_images, split.test_labels % 2)
            train(model, examples, steps // 2, transfer.discriminative_groups(model, 1e-3))
            results.append((head_alone, accuracy(model, split.test_images, split.test_labels % 2)))
        rows.append((name, *map(statistics.mean, zip(*results, strict=True))))
    columns = ("from", "new head alone", "then all layers, slowly")
    show_table("Test accuracy, odd or even, from 20 examples", columns, rows)


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_08_recipe", __doc__)
    split = data.load_digits()
    problem = problem_of(split)
    trials, epochs, steps, seeds = (3, 3, 60, 2) if options.fast else (8, 8, 200, 5)
    for verdict in seven_steps.run(problem, options.output, (1e3, 1e-1, 1e-2, 1e-3, 1e-4), trials, epochs):
        console.print(str(verdict), highlight=False)
    planted_defects(problem)
    more_from_few_examples(split, steps, seeds)
    odd_or_even(split, steps, seeds)
    console.print(f"The verdicts and their plots are in {options.output}.", highlight=False)


if __name__ == "__main__":
    main()
