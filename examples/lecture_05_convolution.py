"""Lecture 5: convolutional networks.

A convolution looks at a small window of all channels at a time, and at every place with the same weights. So it has few
parameters, many multiply-adds, an output that is an image again, and moves its answer when the image moves. How large
the output is, what the layer costs and how far the units of a stack see follows from a few numbers; each rule is
compared here with what the kernels do. Pooling makes the image smaller and the answer less particular about the place.
At last networks learn digits, as they are and with their pixels in another order, where part of what a convolution
gains is lost.

The standard form differs from the lecture's sketch in this:

- The size of the output needs padding and dilation, and is rounded down: floor((N + 2P - D (F - 1) - 1) / S) + 1. A
  stride that does not divide is no error; the last pixels are left out.
- What is called convolution is cross-correlation: the filter is not flipped. A learnt filter does not mind.
- There is no bias before batch norm, which subtracts the mean and any bias with it.
- Depth grows the receptive field by D (F - 1) times the strides of all layers before. That is how far a unit can see;
  what it mostly looks at is the middle, where the most paths lead.

Run it: ``python examples/lecture_05_convolution.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from lesson import accuracy, arguments, console, drawn, fit, learnt, save_figure, save_pictures, show_table
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad, unfold
from torch.utils.flop_counter import FlopCounterMode

from dlkernels import data, functional, models, nn, visualize
from dlkernels.visualize.figures import grid, show_map

cross_entropy = nn.CrossEntropyLoss()


def output_size(size: int, kernel: int, padding: int = 0, stride: int = 1, dilation: int = 1) -> int:
    """The rule."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def real_size(size: int, kernel: int, padding: int = 0, stride: int = 1, dilation: int = 1) -> int:
    """What the kernel returns."""
    image, weight = torch.zeros(1, 1, size, size), torch.zeros(1, 1, kernel, kernel)
    return functional.conv2d(image, weight, None, stride, padding, dilation).shape[3]


def output_sizes() -> None:
    """The rule against conv2d, for some layers by name and for all settings of a range."""
    layers = {
        "5 x 5, small image": (32, 5, 0, 1, 1),
        "3 x 3 of VGG": (224, 3, 1, 1, 1),
        "first of AlexNet": (224, 11, 2, 4, 1),
        "first of ResNet": (224, 7, 3, 2, 1),
        "stride does not divide": (7, 3, 0, 3, 1),
        "dilated, as wide as 5": (32, 3, 0, 1, 2),
        "dilated, same size": (32, 3, 4, 1, 4),
        "1 x 1": (56, 1, 0, 1, 1),
    }
    rows = [(name, *setting, output_size(*setting), real_size(*setting)) for name, setting in layers.items()]
    show_table("Size of the output", ("", "N", "F", "P", "S", "D", "by the rule", "by conv2d"), rows)
    settings = [
        setting
        for setting in product(range(5, 14), range(1, 6), range(3), range(1, 5), range(1, 4))
        if output_size(*setting) > 0
    ]
    agreeing = sum(output_size(*setting) == real_size(*setting) for setting in settings)
    console.print(f"The rule gives the size of {agreeing} of {len(settings)} settings.", highlight=False)


def costs() -> None:
    """Parameters and multiply-adds of layers with K = C = 64 maps of 16 x 16, by formula and as torch counts."""
    channels, size = 64, 16
    layers = {
        "3 x 3": (3, 1),
        "5 x 5": (5, 1),
        "1 x 1": (1, 1),
        "in 4 groups": (3, 4),
        "depthwise": (3, channels),
    }
    rows = []
    with torch.device("meta"):
        for name, (kernel, groups) in layers.items():
            layer = torch.nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups)
            weights = channels * (channels // groups) * kernel**2
            formula = (weights + channels, weights * size**2)
            rows.append((name, *formula, *counted(layer, torch.empty(1, channels, size, size))))
        features = channels * size**2
        dense = torch.nn.Linear(features, features)
        formula = (features**2 + features, features**2)
        rows.append(("dense", *formula, *counted(dense, torch.empty(1, features))))
    columns = ("", "K(C/g FF + 1)", "K C/g FF HW", "parameters", "multiply-adds")
    written = [(name, *(f"{number:,}" for number in numbers)) for name, *numbers in rows]
    show_table(f"Costs of a layer from {channels} x {size} x {size} to the same", columns, written)


def counted(layer: torch.nn.Module, image: Tensor) -> tuple[int, int]:
    """Parameters and multiply-adds."""
    with FlopCounterMode(display=False) as counter:
        layer(image)
    return sum(parameter.numel() for parameter in layer.parameters()), counter.get_total_flops() // 2


def as_linear_layers() -> None:
    """Convolutions as linear layers: over the channels of a pixel, over windows, over the whole image."""
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    point, window, whole = (nn.Conv2d(16, 8, kernel).double() for kernel in (1, 3, 9))

    def linear(rows: Tensor, layer: nn.Conv2d) -> Tensor:
        return functional.linear(rows, layer.weight.flatten(1), layer.bias)

    with torch.no_grad():
        pairs = {
            "1 x 1: a linear layer at each pixel": (linear(x.movedim(1, 3), point).movedim(3, 1), point(x)),
            "3 x 3: one at each window of 16 x 3 x 3": (
                linear(unfold(x, 3).mT, window).mT.unflatten(2, (7, 7)),
                window(x),
            ),
            "9 x 9, as large as the image: one layer": (linear(x.flatten(1), whole), whole(x).flatten(1)),
        }
    rows = [
        (name, " x ".join(map(str, actual.shape)), f"{(expected - actual).abs().max():.0e}")
        for name, (expected, actual) in pairs.items()
    ]
    show_table("Convolutions as linear layers, in float64", ("", "output", "largest difference"), rows)


def receptive_fields(depth: int, output: Path) -> None:
    """How far a unit sees: the pixels whose gradient is not zero, by depth, against the rule."""
    size, edge = 2 ** (depth + 2) + 1, 2**depth  # the border is not drawn
    kinds: dict[str, Callable[[int], tuple[int, int]]] = {  # stride and dilation of each layer
        "3 x 3": lambda layer: (1, 1),
        "stride 2": lambda layer: (2, 1),
        "dilation doubled": lambda layer: (1, 2**layer),
    }
    figure, axes = grid(len(kinds), depth, "What the middle unit depends on: kind, layers: width in pixels", 1.6, 1.75)
    rows = [[str(count)] for count in range(1, depth + 1)]
    for row, (name, setting) in zip(axes, kinds.items(), strict=True):
        settings = [setting(layer) for layer in range(depth)]
        for count, axis in enumerate(row, 1):
            gradient = middle_gradient(settings[:count], size)
            seen = int((gradient.sum(0) > 0).sum())
            expected, step = 1, 1
            for stride, dilation in settings[:count]:
                expected += 2 * dilation * step
                step *= stride
            rows[count - 1].append(f"{expected}, {seen}")
            show_map(axis, gradient[edge:-edge, edge:-edge] / gradient.max(), f"{name}, {count}: {seen}")
    show_table("Width of the receptive field, by the rule and measured", ("layers", *kinds), rows)
    save_figure(figure, output / "receptive_fields.png")


def middle_gradient(settings: list[tuple[int, int]], size: int) -> Tensor:
    """Gradient ``[size, size]`` of the middle unit after 3 x 3 convolutions that average their windows."""
    layers = [nn.Conv2d(1, 1, 3, stride, dilation, dilation, bias=False) for stride, dilation in settings]
    for layer in layers:
        torch.nn.init.constant_(layer.weight, 1 / 9)  # no path cancels another
    image = torch.zeros(1, 1, size, size, requires_grad=True)
    result = torch.nn.Sequential(*layers)(image)[0, 0]
    (gradient,) = torch.autograd.grad(result[result.shape[0] // 2, result.shape[1] // 2], image)
    return gradient[0, 0]


def networks_on_digits(split: data.Split, steps: int, seeds: int) -> torch.nn.Module:
    """Trains networks on digits, and on digits whose pixels are all in another order; a convolutional one with batch
    norm is returned."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def reordered(images: Tensor) -> Tensor:
        return images.flatten(2)[..., order].unflatten(2, (8, 8))

    networks: dict[str, Callable[[], torch.nn.Module]] = {
        "fully connected": lambda: models.TwoLayerNet(64),
        "convolutional": lambda: models.ThreeLayerConvNet(8, 1, kernel_size=3),
        "with batch norm": lambda: models.ThreeLayerConvNet(8, 1, kernel_size=3, batch_norm=True),
    }
    rows = []
    for name, build in networks.items():
        results = []
        for change in (reordered, lambda images: images):
            right = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = build()

                def loss(images: Tensor, labels: Tensor, model: torch.nn.Module = model) -> Tensor:
                    return cross_entropy(model(images), labels)

                batch = drawn(change(split.train_images), split.train_labels, count=32)
                fit(name, steps, batch, [(loss, learnt(model))], 3e-3)
                right.append(accuracy(model, change(split.test_images), split.test_labels))
            results.append(statistics.mean(right))
        rows.append((name, f"{sum(p.numel() for p in model.parameters()):,}", *reversed(results)))
    columns = ("", "parameters", "test accuracy", "in another order")
    show_table(f"Digits, {steps} steps, mean of {seeds} networks", columns, rows)
    return model  # the last one


def pooling(model: torch.nn.Module, split: data.Split, output: Path) -> None:
    """How much a digit changes that moves by a pixel: as an image, after the convolution, after pooling."""
    images = split.test_images
    moved = pad(images, (1, -1, 0, 0), value=images.min().item())
    maps, moved_maps = (visualize.activation_maps(model, x, "conv_activation") for x in (images, moved))
    views: dict[str, tuple[Tensor, Tensor]] = {
        "pixels": (images, moved),
        "after the convolution": (maps, moved_maps),
        "after 2 x 2 maxima": (max_pool2d(maps, 2), max_pool2d(moved_maps, 2)),
        "after 2 x 2 means": (avg_pool2d(maps, 2), avg_pool2d(moved_maps, 2)),
        "after the mean of each map": (maps.mean((2, 3)), moved_maps.mean((2, 3))),
    }
    rows = []
    for name, (before, after) in views.items():
        change = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        rows.append((name, " x ".join(map(str, before.shape[1:])), change.mean().item()))
    show_table("A digit moves by a pixel", ("", "size", "relative change"), rows)
    rows_of_images = {"digits": images[:10]}
    for name, pool in (("2 x 2 maxima", max_pool2d), ("2 x 2 means", avg_pool2d)):
        rows_of_images[name] = pool(images[:10], 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    save_pictures(output / "pooling.png", rows_of_images)


def main() -> None:
    options = arguments("lecture_05", __doc__)
    torch.manual_seed(0)
    split = data.load_digits(0)
    output_sizes()
    costs()
    as_linear_layers()
    receptive_fields(3 if options.fast else 5, options.output)
    model = networks_on_digits(split, *((60, 1) if options.fast else (400, 5)))
    pooling(model, split, options.output)
    save_figure(visualize.draw_filters(visualize.first_layer_filters(model)), options.output / "filters.png")
    image = split.test_images[:1]
    maps = visualize.activation_maps(model, image, "conv_activation")
    figure = visualize.draw_activation_maps(image[0], maps[0], "conv_activation")
    save_figure(figure, options.output / "activation_maps.png")


if __name__ == "__main__":
    main()
