"""Lecture 8: seeing inside a network that recognises digits, and fooling it.

What do its filters look for, which images lie close together in its last layer, which pixels does a decision rest on,
what would it most like to see, and how little must an image change to be taken for another? Each question has a row in
the table and a picture.

The standard form differs from the lecture's sketch in this:

- Guided backpropagation keeps the positive gradients at each rectifier, not the negative ones (Springenberg et al.).
- The receptive field of a maximally activating patch is what the unit can depend on, found exactly, not the pixels
  whose gradient happens not to be zero.
- Shapley values are exact, over all subsets of 16 patches; a sample of orders, as it is needed for more, comes close.
- FGSM is compared with noise that changes every pixel by just as much: the direction is what hurts, not the size.

Run it: ``python examples/lecture_08_seeing_inside.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lesson import arguments, console, drawn, fit, learnt, show_table
from torch import Tensor

from dlkernels import data, models, nn, visualize

Row = tuple[str, str, str]  # the question, what was found, the picture
LAYER = "features.0.activation"


def trained_network(split: data.Split, steps: int) -> torch.nn.Module:
    """A LeNet for digits."""
    torch.manual_seed(0)
    model, loss = models.LeNet(8), nn.CrossEntropyLoss(label_smoothing=0.1)
    batch = drawn(split.train_images, split.train_labels, count=32)
    fit("LeNet", steps, batch, [(lambda images, labels: loss(model(images), labels), learnt(model))], 3e-3)
    return model.eval()


def share_right(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def what_it_knows(model: torch.nn.Module, split: data.Split, folder: Path) -> list[Row]:
    """Filters, embeddings, neighbours, activation maps, patches."""
    images, labels = split.test_images, split.test_labels
    filters = visualize.first_layer_filters(model)
    visualize.save(visualize.draw_filters(filters), folder / "filters.png")
    rows = [("first-layer filters", f"{len(filters)} of {filters.shape[2]} x {filters.shape[3]}", "filters.png")]

    features = visualize.last_features(model, images)
    points, shares = visualize.pca(features)
    figure = visualize.draw_embedding(points, labels, "PCA of the last layer")
    visualize.save(figure, folder / "pca.png")
    rows.append(("last layer, PCA", f"{shares.sum():.0%} of the variance in two dimensions", "pca.png"))
    points = visualize.tsne(features)
    visualize.save(visualize.draw_embedding(points, labels, "t-SNE of the last layer"), folder / "tsne.png")
    nearest, _ = visualize.nearest_neighbours(points, points, 2)
    found = f"{share_right(labels[nearest[:, 1]], labels):.1%} of points are next to their class"
    rows.append(("last layer, t-SNE", found, "tsne.png"))

    known = visualize.last_features(model, split.train_images)
    indices, distances = visualize.nearest_neighbours(features, known, 5)
    drawn = [images[:4], labels[:4], split.train_images, split.train_labels, indices[:4], distances[:4]]
    visualize.save(visualize.draw_neighbours(*drawn), folder / "neighbours.png")
    in_pixels, _ = visualize.nearest_neighbours(images, split.train_images, 1)
    found = (
        f"right {share_right(split.train_labels[indices[:, 0]], labels):.1%} of the times "
        f"(pixels: {share_right(split.train_labels[in_pixels[:, 0]], labels):.1%})"
    )
    rows.append(("nearest neighbour", found, "neighbours.png"))

    maps = visualize.activation_maps(model, images, LAYER)
    visualize.save(visualize.draw_activation_maps(images[0], maps[0], LAYER), folder / "activation_maps.png")
    rows.append(
        ("activation maps", f"{(maps > 0).double().mean():.0%} of activations are not zero", "activation_maps.png")
    )
    strongest = int(maps.amax((0, 2, 3)).argmax())
    patches = visualize.maximal_patches(model, images, LAYER, strongest)
    figure = visualize.draw_maximal_patches(patches, images, LAYER, strongest)
    visualize.save(figure, folder / "maximal_patches.png")
    height, width = max((patch.shape[1:] for patch in patches.patches), key=lambda shape: shape[0] * shape[1])
    found = f"channel {strongest} reads {height} x {width} pixels"
    rows.append(("maximally activating patches", found, "maximal_patches.png"))
    return rows


def why_it_decides(model: torch.nn.Module, split: data.Split, folder: Path) -> list[Row]:
    """Occlusion, Shapley values, saliency, guided backpropagation, class images."""
    images, labels = split.test_images[:6], split.test_labels[:6]
    paper = split.train_images.min().item()
    ink = images[:, 0] > split.train_images.mean()

    def share_in_ink(maps: Tensor) -> str:
        return f"{maps.abs()[ink].sum() / maps.abs().sum():.0%} in the {ink.double().mean():.0%} that are ink"

    drops = visualize.occlusion(model, images, labels, size=3, value=paper)
    visualize.save(visualize.draw_occlusion(images, drops, labels), folder / "occlusion.png")
    rows = [("occlusion", f"of all falls {share_in_ink(drops)}", "occlusion.png")]

    values = visualize.shapley_values(model, images, labels, patch_size=2, baseline=paper)
    visualize.save(visualize.draw_shapley_values(images, values, labels), folder / "shapley.png")
    sampled = visualize.shapley_values(model, images, labels, patch_size=2, permutations=100, baseline=paper)
    error = (sampled - values).abs().mean() / values.abs().mean()
    rows.append(("Shapley values", f"100 orders come within {error:.0%} of all subsets", "shapley.png"))

    gradients = visualize.saliency(model, images, labels)
    visualize.save(visualize.draw_saliency(images, gradients, labels), folder / "saliency.png")
    rows.append(("saliency", f"of all gradient {share_in_ink(gradients[:, 0])}", "saliency.png"))
    guided = visualize.guided_backprop(model, images, labels)
    visualize.save(visualize.draw_guided_backprop(images, guided, labels), folder / "guided_backprop.png")
    rows.append(("guided backpropagation", f"of all gradient {share_in_ink(guided[:, 0])}", "guided_backprop.png"))

    classes = torch.arange(10)
    ideals, probabilities = visualize.class_images(model, classes, (1, 8, 8))
    visualize.save(visualize.draw_class_images(ideals, probabilities, classes), folder / "class_images.png")
    rows.append(("class images", f"the network is {probabilities.min():.1%} sure or more", "class_images.png"))
    return rows


def how_it_is_fooled(model: torch.nn.Module, split: data.Split, folder: Path) -> list[Row]:
    """A targeted attack, and FGSM against noise."""
    images, labels = split.test_images, split.test_labels
    pixel_range = split.train_images.min().item(), split.train_images.max().item()
    shade = (pixel_range[1] - pixel_range[0]) / 16  # the scans have 16 of them
    few, targets = images[:20], (labels[:20] + 1) % 10
    attack = visualize.targeted_attack(model, few, targets, 6 * shade, shade / 2, pixel_range=pixel_range)
    with torch.no_grad():
        seen = [model(batch).argmax(1)[:8] for batch in (few, attack.images)]
    visualize.save(visualize.draw_attack(few[:8], attack.images[:8], *seen), folder / "targeted_attack.png")
    found = (
        f"{int(attack.fooled.sum())} of 20 digits within 6 of 16 shades, in {attack.steps.double().mean():.0f} steps"
    )
    rows = [("targeted attack", found, "targeted_attack.png")]

    shades = [0.0, 0.25, 0.5, 1.0, 2.0, 3.0]
    sizes = [count * shade for count in shades]
    attacked, noisy = visualize.accuracy_under_attack(model, images, labels, sizes, pixel_range)
    figure = visualize.draw_accuracy_under_attack(sizes, attacked, noisy)
    visualize.save(figure, folder / "attacks.png")
    found = f"2 shades: FGSM {attacked[4]:.1%} right, noise {noisy[4]:.1%}"
    return [*rows, ("FGSM and noise of the same size", found, "attacks.png")]


def main() -> None:
    """The whole lesson."""
    options = arguments("lecture_08_seeing_inside", __doc__)
    torch.manual_seed(0)
    split = data.load_digits()
    model = trained_network(split, steps=150 if options.fast else 600)
    with torch.no_grad():
        right = share_right(model(split.test_images).argmax(1), split.test_labels)
    console.print(f"The network recognises {right:.1%} of the test digits.", highlight=False)
    if options.fast:
        split = data.Split(split.train_images, split.train_labels, split.test_images[:120], split.test_labels[:120], 10)
    rows = []
    for part in (what_it_knows, why_it_decides, how_it_is_fooled):
        rows += part(model, split, options.output)
    show_table("Seeing inside", ("subject", "found", "picture"), rows)
    console.print(f"The pictures are in {options.output}.", highlight=False)


if __name__ == "__main__":
    main()
