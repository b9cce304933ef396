"""Lecture 13: architectures, from LeNet to networks found by search, and what each was the first to do.

The families of twenty-five years stand side by side: what they cost, and what they reach on the same digits. Between
that, the ideas that they are made of are tried one by one: depth with skip connections and without, convolutions that
see one channel at a time, a search among cells, and batch norms that vanish into the convolutions before them.

The standard forms differ from the lecture's sketch in this:

- A residual network adds its skip connection, a dense network concatenates. ResNet has no dropout.
- What makes MobileNet small is a pair: a depthwise convolution, which mixes no channels, and a 1x1 convolution, which
  mixes nothing else. Either alone is no substitute for a 3x3 convolution.
- The blocks of MLP-Mixer have skip connections and layer norms, as those of a Transformer.
- GoogLeNet's auxiliary heads serve training only: half of the weights that it is counted with are theirs.
- Neither parameters nor multiply-adds are time: depthwise convolutions need few and wait for memory.

Run it: ``python examples/lecture_13_architectures.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lesson import accuracy, arguments, drawn, fit, learnt, save_figure, show_table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dlkernels
from dlkernels import data, models, nn
from dlkernels.models import nas
from dlkernels.models.blocks import conv_norm_activation
from dlkernels.models.densenet import DenseNet
from dlkernels.models.efficientnet import EfficientNet
from dlkernels.models.googlenet import Inception
from dlkernels.models.mobilenet import MobileNetV1, MobileNetV2
from dlkernels.models.resnet import Bottleneck, CifarResNet
from dlkernels.models.vgg import VGG

conv = partial(conv_norm_activation, activation=torch.nn.ReLU, norm_layer=nn.BatchNorm2d, layers=nn)

# A member of each family: the year of its paper, and what it was the first to do.
FAMILIES = {
    "lenet5": (1998, "convolution, pooling"),
    "alexnet": (2012, "ReLU, dropout, GPUs"),
    "vgg16": (2015, "3x3 convolutions only"),
    "googlenet": (2015, "parallel branches"),
    "resnet50": (2016, "skip connections"),
    "preact_resnet50": (2016, "a clean skip path"),
    "wide_resnet50_2": (2016, "width instead of depth"),
    "resnext50_32x4d": (2017, "groups"),
    "densenet121": (2017, "concatenation"),
    "mobilenet_v1": (2017, "depthwise convolution"),
    "mobilenet_v2": (2018, "inverted residuals"),
    "cellnetwork": (2019, "cells found by search"),
    "mnasnet1_0": (2019, "search for low latency"),
    "efficientnet_b0": (2019, "scaling of all at once"),
    "vit_b_16": (2021, "attention over patches"),
    "mixer_b_16": (2021, "MLPs over patches"),
}
SMALL_IMAGES = ("lenet5", "cellnetwork")  # of 32 x 32 pixels; all others of 224 x 224
FOR_IMAGENET = (
    *("alexnet", "vgg", "googlenet", "resnet", "densenet", "mobilenet", "mnasnet", "efficientnet"),
    *("vision_transformer", "mlp_mixer"),
)


def without_numbers(name: str) -> torch.nn.Module:
    """A network as it is registered, on torch's layers, whose products can be counted."""
    with torch.device("meta"):
        return models.get_model(name, layers=torch.nn).eval()


def parameters(model: torch.nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: torch.nn.Module, size: int) -> int:
    """Of the matrix products and convolutions for one image."""
    channels = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d)).in_channels
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, channels, size, size, device="meta"))
    return counter.get_total_flops() // 2


def networks_for_imagenet(family: str) -> Iterator[torch.nn.Module]:
    """The networks of a family that need no arguments and tell a thousand classes apart."""
    for name in models.list_models(family):
        try:
            model = without_numbers(name)
        except TypeError:  # it asks for sizes
            continue
        if [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1].out_features == 1000:
            yield model


def families(fast: bool, output: Path) -> None:
    """What a member of each family costs; and as a picture, what all members of those for ImageNet cost."""
    rows = []
    for name, (year, idea) in FAMILIES.items():
        model = without_numbers(name)
        products = multiply_adds(model, 32 if name in SMALL_IMAGES else 224)
        rows.append((name, year, f"{parameters(model) / 1e6:.2f}", f"{products / 1e6:,.1f}", idea))
    columns = ("network", "year", "parameters", "multiply-adds", "first with")
    show_table("Families, in millions, with the year of the paper", columns, rows)

    figure, axis = plt.subplots(figsize=(8, 5))
    for index, family in enumerate(FOR_IMAGENET[: 3 if fast else None]):
        points = [(parameters(model), multiply_adds(model, 224)) for model in networks_for_imagenet(family)]
        axis.scatter(*zip(*points, strict=True), label=family, marker="os^Dv"[index % 5], color=f"C{index}", s=30)
    axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="multiply-adds for 224 x 224 pixels")
    axis.set_title("What networks for ImageNet cost")
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3)
    save_figure(figure, output / "costs.png")


# ---- Training on digits ----------------------------------------------------------------------------------------------


def train_on_digits(
    title: str, build: Callable[[], torch.nn.Module], split: data.Split, steps: int, learning_rate: float = 5e-3
) -> tuple[torch.nn.Module, list[float], float]:
    """A network, trained; its loss before each step, and the seconds that it took."""
    torch.manual_seed(0)
    model, cross_entropy = build(), nn.CrossEntropyLoss()
    batch = drawn(split.train_images, split.train_labels, count=32)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(images), labels)

    start = time.perf_counter()
    losses = fit(title, steps, batch, [(loss, learnt(model))], learning_rate)
    return model, losses, time.perf_counter() - start


class Resized(torch.nn.Sequential):
    """A network for colour images of another size."""

    def __init__(self, size: int, model: torch.nn.Module) -> None:
        super().__init__(torch.nn.Upsample(size=(size, size), mode="bilinear"), model)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.expand(-1, 3, -1, -1))


def with_head(*features: torch.nn.Module, channels: int) -> torch.nn.Sequential:
    """A mean over all places and a linear layer after some features."""
    head = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), nn.Linear(channels, 10))
    return torch.nn.Sequential(*features, *head)


def small_members() -> dict[str, Callable[[], torch.nn.Module]]:
    """A small network of each family, for digits."""
    inverted = ((1, 16, 1, 1), (4, 24, 2, 1), (4, 32, 2, 2))
    return {
        "LeNet": lambda: models.LeNet(8),
        "VGG": lambda: with_head(Resized(8, VGG(((24, 24), (48, 48)), batch_norm=True).features), channels=48),
        "GoogLeNet": lambda: with_head(
            conv(1, 24),
            Inception(24, 12, 12, 24, 4, 8, 8, layers=nn),
            torch.nn.MaxPool2d(2),
            Inception(52, 16, 16, 32, 8, 16, 16, layers=nn),
            channels=80,
        ),
        "ResNet": lambda: Resized(8, CifarResNet(14)),
        "ResNeXt": lambda: with_head(
            conv(1, 64),
            Bottleneck(64, 16, 32, 1, 8, 1, None, nn.BatchNorm2d, nn),
            torch.nn.MaxPool2d(2),
            Bottleneck(64, 16, 32, 1, 8, 1, None, nn.BatchNorm2d, nn),
            channels=64,
        ),
        "DenseNet": lambda: Resized(32, DenseNet(12, (3, 3), 24, num_classes=10)),
        "MobileNet v1": lambda: Resized(32, MobileNetV1(10, width_mult=0.25)),
        "MobileNet v2": lambda: Resized(16, MobileNetV2(10, 1.0, inverted, dropout=0.0)),
        "EfficientNet": lambda: Resized(32, EfficientNet(0.25, 0.25, 0.0, 0.0, num_classes=10)),
        "cells of DARTS": lambda: models.CellNetwork(channels=6, num_cells=3, in_channels=1),
        "ViT": lambda: Resized(8, models.VisionTransformer(8, 2, 2, 4, 48, 96, num_classes=10)),
        "MLP-Mixer": lambda: Resized(8, models.MLPMixer(8, 2, 3, 48, 32, 96, num_classes=10)),
    }


def comparison(split: data.Split, steps: int) -> torch.nn.Module:
    """The same digits for a member of each family; returns the trained ResNet."""
    rows, trained = [], {}
    for name, build in small_members().items():
        model, losses, seconds = train_on_digits(name, build, split, steps)
        trained[name] = model
        right = accuracy(model, split.test_images, split.test_labels)
        rows.append((name, f"{parameters(model):,}", statistics.mean(losses[-20:]), right, f"{seconds:.1f}"))
    columns = ("family", "parameters", "last loss", "test accuracy", "seconds")
    show_table(f"Small members of the families on digits, {steps} steps", columns, rows)
    return trained["ResNet"]


# ---- One idea at a time ----------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Two 3x3 convolutions with batch norm, and what the block was given added to them, or not."""

    def __init__(self, channels: int, has_skip: bool) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(conv(channels, channels), conv(channels, channels, activation=None))
        self.activation = torch.nn.ReLU()
        self.has_skip = has_skip

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + x if self.has_skip else self.layers(x))


def tower(depth: int, has_skip: bool) -> torch.nn.Module:
    """``depth`` convolutions of 16 channels, and a linear layer."""
    blocks = (Block(16, has_skip) for _ in range((depth - 1) // 2))
    return with_head(conv(1, 16), *blocks, channels=16)


def depth(split: data.Split, steps: int, output: Path) -> None:
    """Ever deeper networks, plain and residual: it is training that fails in depth, not generalisation."""
    rows = []
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for index, layers in enumerate((9, 21, 45)):
        for name, has_skip in (("plain", False), ("residual", True)):
            build = partial(tower, layers, has_skip)
            model, losses, _ = train_on_digits(f"{name}, {layers}", build, split, steps)
            right = accuracy(model, split.test_images, split.test_labels)
            rows.append((f"{name}, {layers} convolutions", statistics.mean(losses[-20:]), right))
            smooth = torch.tensor(losses).unfold(0, min(10, steps), 1).mean(1)
            axis.plot(smooth, "-" if has_skip else "--", color=f"C{index}", label=f"{name}, {layers}")
    show_table(f"Depth, {steps} steps", ("network", "last training loss", "test accuracy"), rows)
    axis.set(xlabel="step", ylabel="training loss, mean of ten", yscale="log", title="Plain and residual networks")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, output / "depth.png")


def separable(split: data.Split, steps: int) -> None:
    """A 3x3 convolution against its two halves."""
    widths = (32, 64, 64)

    def full(narrow: int, wide: int) -> list[torch.nn.Module]:
        return [conv(narrow, wide)]

    def both(narrow: int, wide: int) -> list[torch.nn.Module]:
        return [conv(narrow, narrow, groups=narrow), conv(narrow, wide, 1)]

    def pointwise(narrow: int, wide: int) -> list[torch.nn.Module]:
        return [conv(narrow, wide, 1)]

    def depthwise(narrow: int, wide: int) -> list[torch.nn.Module]:
        return [conv(narrow, wide, groups=narrow)]

    def network(layer: Callable[[int, int], list[torch.nn.Module]]) -> torch.nn.Module:
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        modules = [module for narrow, wide in pairs for module in layer(narrow, wide)]
        return with_head(conv(1, widths[0]), *modules, channels=widths[-1])

    rows = []
    for name, layer in {
        "3x3 convolution": full,
        "depthwise 3x3, then 1x1": both,
        "1x1 alone": pointwise,
        "depthwise 3x3 alone": depthwise,
    }.items():
        model, _, _ = train_on_digits(name, partial(network, layer), split, steps)
        right = accuracy(model, split.test_images, split.test_labels)
        products = sum(
            module.weight.numel() * (64 if isinstance(module, torch.nn.Conv2d) else 1)
            for module in model.modules()
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        )
        rows.append((name, f"{parameters(model):,}", f"{products:,}", right))
    show_table(f"Convolutions, {steps} steps", ("layer", "parameters", "multiply-adds", "test accuracy"), rows)


def search(split: data.Split, candidates: int, steps: int) -> None:
    """Random search among cells: each candidate is trained briefly, and the best one for longer."""
    held_out = len(split.train_labels) // 5
    validation = split.train_images[:held_out], split.train_labels[:held_out]
    rest = data.Split(split.train_images[held_out:], split.train_labels[held_out:], *validation, 10)

    def trained(genotype: nas.Genotype, split: data.Split, steps: int) -> torch.nn.Module:
        build = partial(models.CellNetwork, genotype, channels=4, num_cells=3, in_channels=1)
        return train_on_digits("cells", build, split, steps, 1e-2)[0]

    def score(genotype: nas.Genotype) -> float:
        return accuracy(trained(genotype, rest, steps), *validation)

    found = nas.search(score, candidates=candidates, population=candidates, tournament=1, nodes=2)
    ranked = sorted(found.history, key=lambda candidate: -candidate.score)
    rows = [
        (place, str(candidate.genotype).split("; ")[0].removeprefix("normal: "), candidate.score)
        for place, candidate in enumerate(ranked, 1)
    ]
    show_table(f"Random search, {steps} steps each", ("", "normal cell", "validation accuracy"), rows)
    model = trained(found.best.genotype, split, 4 * steps)
    rows = [(f"{parameters(model):,}", accuracy(model, split.test_images, split.test_labels))]
    show_table(f"The best cells, {4 * steps} steps", ("parameters", "test accuracy"), rows)


def fusion(model: torch.nn.Module, split: data.Split) -> None:
    """Batch norms folded into the convolutions before them: the same outputs, with less to do."""
    networks = {"as trained": model.eval(), "fused": dlkernels.fuse(copy.deepcopy(model.eval()))}
    images = split.test_images[:64]
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.no_grad():
        outputs = {name: network(images) for name, network in networks.items()}
        for _ in range(30):
            for name, network in networks.items():  # by turns, so that both meet the same machine
                start = time.perf_counter()
                network(images)
                times[name].append(time.perf_counter() - start)
    rows = []
    for name, network in networks.items():
        norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
        difference = (outputs[name] - outputs["as trained"]).abs().max().item()
        rows.append((name, norms, f"{difference:.1e}", f"{1e3 * min(times[name]):.2f}"))
    show_table("Batch norms folded", ("ResNet", "batch norms", "outputs differ by", "ms for 64 images"), rows)


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_13_architectures", __doc__)
    split = data.load_digits(0)
    families(options.fast, options.output)
    depth(split, 10 if options.fast else 120, options.output)
    separable(split, 5 if options.fast else 200)
    search(split, *((2, 3) if options.fast else (8, 40)))
    fusion(comparison(split, 3 if options.fast else 250), split)


if __name__ == "__main__":
    main()
