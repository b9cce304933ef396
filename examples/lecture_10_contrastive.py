"""Lecture 10: contrastive learning, self-distillation, and images with their texts.

Two views of one image are to be told from all other images by the dot product of their features (InfoNCE, NT-Xent). The
views say what should not matter: here turns, shears, sizes and shifts of digits. SimCLR takes the others from the
batch, MoCo from a queue of keys of an encoder that follows slowly; CPC predicts what follows in a sequence, here the
rows of a digit; DINO has no others at all; CLIP finds the text of an image, and so becomes a classifier of whatever can
be named.

Where the standard forms, built here, go beyond the lecture:

- DINO's centre is a moving average of the mean of the teacher's logits, which is subtracted; centring against one
  output for everything and sharpening against all outputs alike only work together.
- CLIP's loss is symmetric, from images to texts and from texts to images; its temperature is learnt, as the logarithm
  of its inverse, which is kept from passing log 100.
- What a loss is worth is seen beside its value at collapse, where all features are alike: log(2N - 1) for NT-Xent,
  log(K + 1) for MoCo, log N for CLIP. A loss that stays there has learnt nothing.
- Features are taken before the projection head, which throws away what the views differ in.

Run it: ``python examples/lecture_10_contrastive.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lesson import arguments, drawn, fit, learnt, save_figure, save_pictures, show_table
from torch import Tensor

from dlkernels import data, nn, ssl
from dlkernels.models.blocks import conv_norm_activation

FEATURES = 64
BATCH = 128
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

conv = partial(conv_norm_activation, activation=torch.nn.ReLU, norm_layer=nn.BatchNorm2d, layers=nn)


def encoder() -> torch.nn.Sequential:
    """Images of any size to 64 features."""
    return torch.nn.Sequential(
        conv(1, 32),
        conv(32, 64, stride=2),
        conv(64, 64),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        nn.BatchNorm1d(FEATURES),
    )


class Rows(torch.nn.Module):
    """The context of CPC after the last row of a digit."""

    def __init__(self, model: ssl.CPC) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.squeeze(1))[:, -1]


def views() -> torch.nn.Module:
    """Turns, sheared, scaled and shifted digits. Flips and crops, which suit photographs, would make other digits."""
    from kornia.augmentation import RandomAffine

    return RandomAffine(15, (0.15, 0.15), (0.8, 1.2), shear=10, padding_mode="border", p=1.0)


def worth(encoder: torch.nn.Module, split: data.Split, draws: int) -> tuple[float, float]:
    """Test accuracy with 10 labels a class of a linear probe and of the five nearest neighbours, averaged over draws of
    the labels."""
    known, unknown = (ssl.features_of(encoder, images) for images in (split.train_images, split.test_images))
    right = torch.zeros(2)
    for seed in range(draws):
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[split.train_labels[order] == label][:10] for label in range(10)])
        labelled = (known[chosen], split.train_labels[chosen], unknown)
        for index, classes in enumerate((ssl.linear_probe(*labelled), ssl.weighted_knn(*labelled, k=5))):
            right[index] += (classes == split.test_labels).float().mean() / draws
    probe, neighbours = right.tolist()
    return probe, neighbours


def without_labels(split: data.Split, fast: bool, output: Path) -> None:
    """Each method on scikit-learn's digits, beside the same encoder with its random weights."""
    steps, draws, shown = (5, 1, 60) if fast else (200, 5, len(split.test_labels))
    augment, local = views(), ssl.random_view(6, (0.4, 0.8), strength=0.0, flip=0.0, blur=0.0)
    rows_of_digits = torch.nn.Sequential(nn.Linear(8, 16), torch.nn.ReLU(), nn.Linear(16, 16))
    queue = 512
    head = ssl.DINOHead(FEATURES, 256, 256, 64)
    cpc = ssl.CPC(rows_of_digits, 16, 128, steps=3)
    methods: dict[str, tuple[torch.nn.Module, float]] = {  # and the loss at collapse
        "SimCLR": (ssl.SimCLR(encoder(), FEATURES, augment, 32, 0.2), math.log(2 * BATCH - 1)),
        "MoCo v1": (ssl.moco_v1(encoder(), FEATURES, augment, 32, queue, 0.99), math.log(queue + 1)),
        "MoCo v2": (ssl.moco_v2(encoder(), FEATURES, augment, 32, queue, 0.99, 0.1), math.log(queue + 1)),
        "DINO": (ssl.DINO(encoder(), head, augment, local, 1, steps, momentum=0.99), math.log(256)),
        "CPC": (cpc, sum(math.log(BATCH * (8 - step)) for step in (1, 2, 3)) / 3),
    }
    table: list[tuple[object, ...]] = []
    features = {}
    for name, (model, collapsed) in methods.items():
        loss: Callable[[Tensor], Tensor] = model.loss
        looked_at = model.encoder
        if isinstance(model, ssl.CPC):
            loss, looked_at = (lambda images: cpc.loss(images.squeeze(1))), Rows(model)
        before = worth(looked_at, split, draws)
        features.setdefault("random weights", ssl.features_of(looked_at, split.test_images))
        learning_rate = 2e-3 if name == "DINO" else 5e-3
        fit(name, steps, drawn(split.train_images, count=BATCH), [(loss, learnt(model))], learning_rate, updates(model))
        with torch.no_grad():
            final = loss(split.train_images[:BATCH]).item()
        after = worth(looked_at, split, draws)
        features[name] = ssl.features_of(looked_at, split.test_images)
        table.append((name, final, collapsed, before[0], after[0], before[1], after[1]))
    columns = ("", "loss", "at collapse", "probe before", "after", "k-NN before", "after")
    show_table(f"Digits without labels, {steps} steps each; then 10 labels a class", columns, table)
    save_pictures(
        output / "views.png",
        {
            "digits": split.train_images[:12],
            "views": augment(split.train_images[:12]),
            "other views": augment(split.train_images[:12]),
            "local views": local(split.train_images[:12]),
        },
    )
    features = {name: points[:shown] for name, points in features.items()}
    save_projections(output / "features.png", features, split.test_labels[:shown])


def updates(model: torch.nn.Module) -> Callable[[], None]:
    """What a method does after each step of the optimiser."""
    return getattr(model, "update", lambda: None)


def save_projections(path: Path, features: dict[str, Tensor], labels: Tensor) -> None:
    """Writes a PNG of each set of features in two dimensions, by t-SNE, in the colours of their classes."""
    from sklearn.manifold import TSNE

    figure, axes = plt.subplots(1, len(features), figsize=(3 * len(features), 3.2))
    for axis, (name, points) in zip(axes, features.items(), strict=True):
        first, second = TSNE(random_state=0).fit_transform(points.numpy()).T
        axis.scatter(first, second, c=labels, cmap="tab10", s=6)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    save_figure(figure, path)


def with_texts(split: data.Split, steps: int, output: Path) -> None:
    """CLIP on digits and their names, spelt: ten pairs a step, one of each name. Then it classifies, by the names."""
    letters = sorted({letter for name in NAMES for letter in name})
    end, length = 1, 1 + max(len(name) for name in NAMES)
    texts = torch.zeros(10, length, dtype=torch.int64)
    for row, name in zip(texts, NAMES, strict=True):
        row[: len(name) + 1] = torch.tensor([*(2 + letters.index(letter) for letter in name), end])
    of_class = [(split.train_labels == label).nonzero().flatten() for label in range(10)]

    def batch() -> tuple[Tensor, Tensor]:
        chosen = [rows[torch.randint(len(rows), ())] for rows in of_class]
        return split.train_images[torch.stack(chosen)], texts

    text_encoder = ssl.TextEncoder(2 + len(letters), length, 32, 2, 1, end_index=end)
    model = ssl.CLIP(encoder(), FEATURES, text_encoder, 32, 32)
    with torch.no_grad():
        before = (model.eval()(split.test_images, texts).argmax(1) == split.test_labels).float().mean().item()
    fit("CLIP", steps, batch, [(model.train().loss, learnt(model))], 3e-3, model.update)
    with torch.no_grad():
        logits = model.eval()(split.test_images, texts)
    after = (logits.argmax(1) == split.test_labels).float().mean().item()
    retrieved = split.test_labels[logits.argmax(0)]  # the image that each name fits best
    rows = [
        ("test digits whose name is found", before, after),
        ("names whose best image is right", "", (retrieved == torch.arange(10)).float().mean().item()),
        ("scale of the logits", 1 / 0.07, model.log_scale.exp().item()),
    ]
    show_table(f"CLIP: digits and their names, {steps} steps of ten pairs", ("", "at first", "learnt"), rows)
    save_pictures(output / "names.png", {"what fits best: " + ", ".join(NAMES): split.test_images[logits.argmax(0)]})


def main() -> None:
    options = arguments("lecture_10", __doc__)
    torch.manual_seed(0)
    split = data.load_digits(0)
    without_labels(split, options.fast, options.output)
    with_texts(split, 5 if options.fast else 400, options.output)


if __name__ == "__main__":
    main()
