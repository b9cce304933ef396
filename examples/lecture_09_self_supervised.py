"""Lecture 9: features that images teach by themselves, through pretext tasks.

Labels are dear, images are not. A pretext task makes its labels out of the images: which way up is this, where is this
patch, in which order are these tiles, what was in this hole, what colour was this. Nobody wants the answers; the
features that find them serve other tasks. They are judged by a linear probe: a linear classifier on frozen features,
here with 10 labels of each class, against the same network with its random weights.

Where the standard forms, built here, go beyond the idea:

- Jigsaw does not choose among all orders but among a set that differ in as many places as can be (Noroozi & Favaro).
- Patches keep gaps, and tiles are drawn from their cells and normalised each by itself: or else edges and colours that
  go on tell the answer.
- Colourisation is no regression, whose best guess is the grey mean of all possible colours, but a classification over
  bins of the (a, b) plane in which rare colours weigh more (Zhang et al.): less right on average, and more vivid.
- A pretext task is as good as what its answers need to know. To rebuild a digit is to know nearly all of it; the last
  layer of a network that can tell which way up a digit is knows that, and less of its class than random weights do.

Run it: ``python examples/lecture_09_self_supervised.py [--fast] [--output FOLDER]``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lesson import arguments, drawn, fit, learnt, save_pictures, show_table
from torch import Tensor

from dlkernels import data, models, nn, ssl
from dlkernels.models.blocks import conv_norm_activation
from dlkernels.ssl import pretext

conv = partial(conv_norm_activation, activation=torch.nn.ReLU, norm_layer=nn.BatchNorm2d, layers=nn)


def digit_encoder() -> torch.nn.Module:
    """8 x 8 pixels to 64 features."""
    return torch.nn.Sequential(
        conv(1, 32), conv(32, 64, stride=2), conv(64, 64), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )


def piece_encoder() -> torch.nn.Module:
    """Patches and tiles of any size to 256 features."""
    return torch.nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
    )


def probe(encoder: torch.nn.Module, split: data.Split, draws: int) -> float:
    """Test accuracy of a linear probe with 10 labels a class, averaged over draws of the labels."""
    known, unknown = (ssl.features_of(encoder, images) for images in (split.train_images, split.test_images))
    right = 0.0
    for seed in range(draws):
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[split.train_labels[order] == label][:10] for label in range(10)])
        classes = ssl.linear_probe(known[chosen], split.train_labels[chosen], unknown)
        right += (classes == split.test_labels).float().mean().item() / draws
    return right


def accuracy(logits: Tensor, answers: Tensor) -> float:
    return (logits.argmax(1) == answers).float().mean().item()


def pretext_tasks(split: data.Split, fast: bool, output: Path) -> None:
    """Five tasks on scikit-learn's digits, each solved on test images, and what a probe of its features is worth."""
    steps, draws = (10, 1) if fast else (200, 5)
    images, unseen = split.train_images, split.test_images
    rows: list[tuple[object, ...]] = []

    def pretrain(title: str, model: torch.nn.Module, encoder: torch.nn.Module, learning_rate: float = 5e-3) -> float:
        """Trains ``model``; returns the accuracy of a probe of the encoder before."""
        before = probe(encoder, split, draws)
        fit(title, steps, drawn(images), [(model.loss, learnt(model))], learning_rate)
        model.eval()
        return before

    rotation = ssl.RotationPrediction(digit_encoder(), 64)
    before = pretrain("rotation", rotation, rotation.encoder)
    turned, turns = pretext.rotated(unseen)
    solved = accuracy(rotation(turned), turns)
    rows.append(("rotation, accuracy", solved, 1 / 4, before, probe(rotation.encoder, split, draws)))

    location = ssl.RelativePatchLocation(piece_encoder(), 256, patch_size=2, gap=1, hidden_features=128)
    before = pretrain("relative patch location", location, location.encoder, 3e-3)
    first, second, place = location.patches(unseen)
    solved = accuracy(location(first, second), place)
    rows.append(("relative patch location, accuracy", solved, 1 / 8, before, probe(location.encoder, split, draws)))

    jigsaw = ssl.Jigsaw(piece_encoder(), 256, ssl.distant_permutations(4, 24), tile_size=4, hidden_features=128)
    before = pretrain("jigsaw", jigsaw, jigsaw.encoder, 3e-3)
    tiles, chosen = jigsaw.tiles(unseen), torch.randint(24, (len(unseen),))
    mixed = pretext.permuted(tiles, jigsaw.permutations[chosen])
    answers = jigsaw(mixed)
    restored = pretext.permuted(mixed, jigsaw.permutations[answers.argmax(1)].argsort(1))
    rows.append(("jigsaw, accuracy", accuracy(answers, chosen), 1 / 24, before, probe(jigsaw.encoder, split, draws)))

    denoising = models.Autoencoder(8, code_features=64, widths=(16, 32), noise=0.5)
    before = pretrain("denoising autoencoder", denoising, denoising.encoder)
    noisy = unseen + 0.5 * torch.randn_like(unseen)
    cleaned = denoising(noisy)
    error = (cleaned - unseen).square().mean().item()
    rows.append(("denoising autoencoder, error", error, 0.5**2, before, probe(denoising.encoder, split, draws)))

    inpainting = ssl.Inpainting(8, 1, hole_size=4, code_features=64, widths=(16, 32))
    before = probe(inpainting.generator.encoder, split, draws)
    players = [
        (inpainting.discriminator_loss, learnt(inpainting.discriminator)),
        (inpainting.loss, learnt(inpainting.generator)),
    ]
    fit("inpainting", steps, drawn(images), players)
    top, left = inpainting.eval().holes(unseen)
    filled = inpainting(unseen, top, left)
    holes = inpainting(torch.full_like(unseen, 0.0), top, left) != 0
    error = (filled - unseen)[holes].square().mean().item()
    variance = unseen[holes].var().item()
    rows.append(("inpainting, error", error, variance, before, probe(inpainting.generator.encoder, split, draws)))

    columns = ("task", "on test digits", "a guess", "probe before", "after")
    show_table(f"Pretext tasks on digits, {steps} steps each", columns, rows)
    save_pictures(
        output / "pretext_tasks.png",
        {
            "turned by 0, 1, 2, 3 quarters": turned.view(4, -1, 1, 8, 8)[:, :3].transpose(0, 1).flatten(0, 1),
            "jigsaw: mixed": pretext.join_tiles(mixed[:12]),
            "jigsaw: put in the order found": pretext.join_tiles(restored[:12]),
            "noisy": noisy[:12],
            "denoised": cleaned[:12],
            "with holes": unseen[:12].masked_fill(holes[:12], unseen.min()),
            "filled": filled[:12],
        },
    )


def photographs() -> Tensor:
    """scikit-learn's photographs of a temple and a flower at half their size, ``[2, 3, 213, 320]`` from 0 to 1."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2) / 255, 2)


def crops(photographs: Tensor, count: int, size: int) -> Tensor:
    """Squares of either photograph, ``[count, 3, size, size]``."""
    chosen = photographs[torch.randint(2, (count,))]
    top = torch.randint(photographs.shape[2] - size + 1, (count,))
    left = torch.randint(photographs.shape[3] - size + 1, (count,))
    return pretext.squares(chosen, top, left, size)


def map_encoder(in_channels: int) -> torch.nn.Module:
    """Images to maps of 32 features at half their size."""
    return torch.nn.Sequential(conv(in_channels, 32), conv(32, 64, stride=2), conv(64, 64), nn.Conv2d(64, 32, 1))


def colours(steps: int, output: Path) -> None:
    """Colour from lightness, and each from the other, on the right three quarters of two photographs; tested on
    the left quarter."""
    everything = photographs()
    seen, unseen = everything[..., 80:], everything[..., :80]
    bins = ssl.color_bins()
    tests = crops(unseen, 24, 32)
    lightness, colors = ssl.rgb_to_lab(tests)
    grey = colors.square().mean().sqrt().item()
    rows: list[tuple[object, ...]] = [("all grey", grey)]
    pictures = {"test images": tests[:12], "lightness": lightness[:12]}
    for title, prior in (("all bins alike", None), ("rare bins weigh more", ssl.color_prior(seen, bins))):
        model = ssl.Colorization(map_encoder(1), 32, bins, prior)
        fit(f"colour: {title}", steps, lambda: (crops(seen, 16, 32),), [(model.loss, learnt(model))])
        coloured = model.eval().colorize(lightness)
        error = (ssl.rgb_to_lab(coloured)[1] - colors).square().mean().sqrt().item()
        saturation = ssl.rgb_to_lab(coloured)[1].norm(dim=1).mean().item()
        rows.append((title, error, saturation))
        pictures[f"coloured: {title}"] = coloured[:12]
    rows[0] = ("all grey", grey, 0.0)
    rows.append(("the photographs", 0.0, colors.norm(dim=1).mean().item()))
    show_table(f"Colour from lightness, {steps} steps", ("", "error of (a, b)", "mean saturation"), rows)

    brain = ssl.SplitBrainAutoencoder(map_encoder(1), map_encoder(2), 32, bins)
    fit("split-brain autoencoder", steps, lambda: (crops(seen, 16, 32),), [(brain.loss, learnt(brain))])
    with torch.no_grad():
        brain.eval()
        halves = [brain.color_prediction.loss(lightness / 50 - 1, colors)]
        halves.append(brain.lightness_prediction.loss(colors / 110, lightness))
    guesses = [torch.tensor(float(len(bins))).log(), torch.tensor(100.0).log()]
    rows = [
        (half, loss.item(), guess.item())
        for half, loss, guess in zip(("colour", "lightness"), halves, guesses, strict=True)
    ]
    show_table("Split-brain autoencoder: cross-entropy of each half from the other", ("", "test", "a guess"), rows)
    save_pictures(output / "colours.png", pictures)


def following(steps: int, output: Path) -> None:
    """Videos are made by panning over the photographs. Who learns to copy colours from the frame before has learnt to
    follow what moves: a mark is carried along."""
    everything = photographs()
    seen, unseen = everything[..., 80:], everything[..., :80]

    def videos(photographs: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Two frames ``[count, 2, 3, 32, 32]``, and by how much the second has moved, ``[count, 2]``."""
        large = crops(photographs, count, 40)
        move = torch.randint(-4, 5, (count, 2))
        frames = [large[..., 4:36, 4:36], pretext.squares(large, *(4 + move.T), 32)]
        return torch.stack(frames, 1), move

    from sklearn.cluster import KMeans

    pixels = ssl.color.as_rows(ssl.rgb_to_lab(crops(seen, 40, 16))[1])
    palette = torch.from_numpy(KMeans(16, n_init=1, random_state=0).fit(pixels.numpy()).cluster_centers_)
    model = ssl.VideoColorization(map_encoder(1), palette)
    tests, moves = videos(unseen, 24)
    lightness = ssl.rgb_to_lab(tests.flatten(0, 1))[0].unflatten(0, (24, 2))
    mark = torch.zeros(24, 1, 1, 32, 32)
    mark[..., 10:22, 10:22] = 1.0
    truth = torch.zeros(24, 1, 32, 32)
    for n, (down, right) in enumerate(moves.tolist()):
        truth[n, :, 10 - down : 22 - down, 10 - right : 22 - right] = 1.0
    where = (torch.nn.functional.avg_pool2d(truth, 2) > 0.5).flatten(1)  # in the map of features, 36 places each

    def overlap() -> tuple[float, Tensor]:
        """Of the 36 places that are marked most with those where the mark went; and the marks."""
        with torch.no_grad():
            carried = model.eval()(lightness, mark)  # [24, 1, 16, 16]
        model.train()
        found = torch.zeros_like(where).scatter_(1, carried.flatten(1).topk(36, 1).indices, True)
        return ((found & where).sum() / (found | where).sum()).item(), carried

    before, _ = overlap()
    fit("video colouring", steps, lambda: (videos(seen, 16)[0],), [(model.loss, learnt(model))])
    after, carried = overlap()
    show_table(
        f"Following by attention that learnt to copy colours, {steps} steps",
        ("", "random", "pretrained"),
        [("overlap of a mark with where it went", before, after)],
    )
    save_pictures(
        output / "following.png",
        {
            "first frame": tests[:12, 0],
            "marked": mark[:12, 0],
            "second frame": tests[:12, 1],
            "carried": carried[:12],
            "truth": truth[:12],
        },
    )


def main() -> None:
    options = arguments("lecture_09", __doc__)
    torch.manual_seed(0)
    pretext_tasks(data.load_digits(0), options.fast, options.output)
    colours(3 if options.fast else 150, options.output)
    following(3 if options.fast else 150, options.output)


if __name__ == "__main__":
    main()
