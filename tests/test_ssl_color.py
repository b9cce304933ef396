"""Colour: known points of Lab, bins and their weights, losses as written out, and colours that are learnt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlkernels import nn, ssl
from dlkernels.ssl import color

from .cases.self_supervision import Outputs

pytest.importorskip("kornia")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


POINTS = {  # RGB: lightness, a, b under D65
    (1.0, 1.0, 1.0): (100.0, 0.0, 0.0),
    (0.0, 0.0, 0.0): (0.0, 0.0, 0.0),
    (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
    (0.0, 1.0, 0.0): (87.73, -86.18, 83.18),
    (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
    (1.0, 1.0, 0.0): (97.14, -21.55, 94.48),
    (0.5, 0.5, 0.5): (53.39, 0.0, 0.0),
}


@pytest.mark.parametrize("rgb", POINTS)
def test_known_points_of_lab(rgb: tuple[float, float, float]) -> None:
    image = torch.tensor(rgb).view(1, 3, 1, 1)
    lightness, colors = ssl.rgb_to_lab(image)
    assert torch.cat([lightness, colors], 1).flatten().tolist() == pytest.approx(POINTS[rgb], abs=0.02)
    torch.testing.assert_close(ssl.lab_to_rgb(lightness, colors), image, rtol=0, atol=1e-4)


def test_lab_and_back_is_the_same_image() -> None:
    images = torch.rand(3, 3, 5, 7)
    torch.testing.assert_close(ssl.lab_to_rgb(*ssl.rgb_to_lab(images)), images, rtol=0, atol=1e-4)


def test_the_gamut_holds_all_colours_and_no_more() -> None:
    centers = ssl.gamut()
    assert centers.shape == (261, 2)
    assert torch.equal(centers, 10 * (centers / 10).round())
    _, colors = ssl.rgb_to_lab(torch.rand(1, 3, 100, 100))
    colors = color.as_rows(colors)
    assert torch.cdist(colors, centers, p=math.inf).amin(1).max() <= 5
    assert len(ssl.gamut(20.0)) < 100


def test_a_value_is_shared_by_its_nearest_bins() -> None:
    bins = ssl.Bins(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]]), neighbours=3, deviation=5.0)
    value = torch.tensor([[2.0, 1.0]])
    heights = [math.exp(-distance / 50) for distance in (4 + 1, 64 + 1, 4 + 81)]
    expected = [height / sum(heights) for height in heights]
    assert bins.shares(value).tolist()[0] == pytest.approx([*expected, 0.0])
    assert bins.nearest(value).tolist() == [0]
    hard = ssl.Bins(bins.centers)
    assert torch.equal(hard.shares(value), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_rare_bins_weigh_more_and_the_mean_weight_is_one() -> None:
    prior = torch.tensor([0.7, 0.2, 0.1, 0.0])
    weights = ssl.rebalancing(prior)
    assert (weights * prior).sum().item() == pytest.approx(1)
    assert (weights[1:] > weights[:-1]).all()
    assert (weights[2] / weights[0]).item() == pytest.approx((0.35 + 0.125) / (0.05 + 0.125))
    torch.testing.assert_close(ssl.rebalancing(torch.full((4,), 0.25)), torch.ones(4))
    torch.testing.assert_close(ssl.rebalancing(prior, uniform_share=1.0), torch.ones(4))


def test_a_prior_counts_the_colours_of_images() -> None:
    bins = ssl.color_bins()
    images = torch.rand(2, 3, 4, 4)
    prior = ssl.color_prior(images, bins)
    assert prior.sum().item() == pytest.approx(1)
    grey = ssl.color_prior(torch.full((1, 3, 2, 2), 0.4), bins)
    assert torch.equal(bins.centers[grey.argmax()], torch.zeros(2))
    assert (grey > 0).sum() == 5


def small_bins() -> ssl.Bins:
    return ssl.Bins(ssl.gamut(40.0), neighbours=3)


def test_the_loss_of_colourisation_is_the_weighted_cross_entropy_written_out() -> None:
    """At half the resolution, where colours are averaged; a place weighs as the bin that it is most in."""
    bins = small_bins()
    prior = torch.rand(len(bins)).softmax(0)
    model = ssl.Colorization(nn.Conv2d(1, 6, 2, stride=2), 6, bins, prior).double()
    images = torch.rand(2, 3, 4, 6, dtype=torch.float64)
    lightness, colors = ssl.rgb_to_lab(images)
    log_probabilities = model(lightness).log_softmax(1)  # [2, Q, 2, 3]
    weights = ssl.rebalancing(prior).double()
    total = torch.zeros((), dtype=torch.float64)
    for n in range(2):
        for row in range(2):
            for column in range(3):
                mean = colors[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
                shares = bins.double().shares(mean[None])[0]
                cross_entropy = -(shares * log_probabilities[n, :, row, column]).sum()
                total = total + weights[shares.argmax()] * cross_entropy / 12
    loss = model.loss(images)
    torch.testing.assert_close(loss, total)
    parameters = list(model.parameters())
    gradients, written_out = (torch.autograd.grad(x, parameters) for x in (loss, total))
    for actual, expected in zip(gradients, written_out, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_without_a_prior_all_colours_count_alike() -> None:
    bins = small_bins()
    model = ssl.Colorization(nn.Conv2d(1, 6, 1), 6, bins)
    even = ssl.Colorization(model.prediction.network, 6, bins, torch.full((len(bins),), 1 / len(bins)))
    even.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 4, 6)
    torch.testing.assert_close(model.loss(images), even.loss(images))


def test_a_guess_costs_the_logarithm_of_the_number_of_bins() -> None:
    model = ssl.Colorization(nn.Conv2d(1, 6, 1), 6, ssl.color_bins())
    torch.nn.init.zeros_(model.prediction.classifier.weight)
    torch.nn.init.zeros_(model.prediction.classifier.bias)
    assert model.loss(torch.rand(2, 3, 4, 4)).item() == pytest.approx(math.log(261), rel=1e-5)


def test_the_logits_of_bins_are_never_in_memory() -> None:
    """One block of targets is, and what it is made of: the distances to the bins."""
    model = ssl.Colorization(nn.Conv2d(1, 6, 1), 6, ssl.color_bins())
    images = torch.rand(2, 3, 16, 16)
    with Outputs() as outputs:
        model.prediction.bins.shares(color.as_rows(ssl.rgb_to_lab(images)[1]))
    blocks = outputs.blocks(2 * 256 * 261)
    with Outputs() as outputs:
        model.loss(images).backward()
    assert outputs.blocks(2 * 256 * 261) == blocks


def test_colours_are_decoded_between_the_likeliest_and_the_mean() -> None:
    bins = ssl.Bins(torch.tensor([[30.0, 0.0], [-30.0, 0.0], [0.0, 30.0]]))
    model = ssl.Colorization(nn.Conv2d(1, 6, 1), 6, bins)
    torch.nn.init.zeros_(model.prediction.classifier.weight)
    logits = torch.tensor([2.0, 1.0, 0.0])
    model.prediction.classifier.bias.data = logits
    lightness = torch.full((1, 1, 4, 4), 60.0)
    for temperature, shares in (
        (1e-3, torch.tensor([1.0, 0.0, 0.0])),
        (0.38, (logits / 0.38).softmax(0)),
        (1.0, logits.softmax(0)),
    ):
        expected = (shares @ bins.centers).view(1, 2, 1, 1).expand(1, 2, 4, 4)
        images = model.colorize(lightness, temperature)
        torch.testing.assert_close(images, ssl.lab_to_rgb(lightness, expected), rtol=0, atol=1e-4)


def test_each_half_of_a_split_brain_predicts_what_the_other_sees() -> None:
    model = ssl.SplitBrainAutoencoder(nn.Conv2d(1, 6, 2, 2), nn.Conv2d(2, 6, 2, 2), 6, small_bins())
    images = torch.rand(2, 3, 4, 6)
    lightness, colors = ssl.rgb_to_lab(images)
    features = model(images)
    assert features.shape == (2, 12, 2, 3)
    greyed = ssl.lab_to_rgb(lightness, torch.zeros_like(colors))
    torch.testing.assert_close(model(greyed)[:, :6], features[:, :6], rtol=0, atol=1e-3)
    assert not torch.allclose(model(greyed)[:, 6:], features[:, 6:], rtol=0, atol=1e-3)

    darkness = model.lightness_prediction
    assert len(darkness.bins) == 100
    assert darkness.bins.nearest(torch.tensor([[0.0], [0.99], [57.3], [100.0]])).tolist() == [0, 0, 57, 99]
    expected = model.color_prediction.loss(lightness / 50 - 1, colors) + darkness.loss(colors / 110, lightness)
    torch.testing.assert_close(model.loss(images), expected)


PALETTE = torch.tensor([[40.0, 20.0], [-40.0, 20.0], [0.0, -40.0], [0.0, 0.0]])


def test_a_frame_is_coloured_by_attention_to_those_before() -> None:
    model = ssl.VideoColorization(nn.Conv2d(1, 5, 2, stride=2), PALETTE).double()
    frames = torch.rand(2, 3, 3, 4, 6, dtype=torch.float64)
    lightness, colors = ssl.rgb_to_lab(frames.flatten(0, 1))
    places = model.encoder(lightness / 50 - 1).unflatten(0, (2, 3)).movedim(2, 4).flatten(2, 3)  # [2, 3, 6, 5]
    pooled = torch.nn.functional.avg_pool2d(colors, 2).unflatten(0, (2, 3)).movedim(2, 4).flatten(2, 3)  # [2, 3, 6, 2]
    rounded = (pooled[..., None, :] - PALETTE).square().sum(-1).argmin(-1)  # [2, 3, 6]
    total = torch.zeros((), dtype=torch.float64)
    for n in range(2):
        for place in range(6):
            attention = (places[n, :2].flatten(0, 1) @ places[n, 2, place]).softmax(0)  # [12]
            share = attention[rounded[n, :2].flatten() == rounded[n, 2, place]].sum()
            total = total - share.clamp_min(color.LEAST_PROBABILITY).log() / 12
    torch.testing.assert_close(model.loss(frames), total, rtol=1e-5, atol=0)


def test_pointers_carry_values_to_where_they_point() -> None:
    """Features that tell each lightness apart find it again; those that tell nothing give the mean."""

    class Levels(torch.nn.Module):
        def forward(self, lightness: Tensor) -> Tensor:
            levels = torch.linspace(-1, 1, 11)[None, :, None, None]
            return 20 * torch.exp(-100 * (lightness - levels).square())

    lightness = torch.randint(0, 11, (1, 2, 1, 4, 4)) * 10.0
    lightness[:, 0, 0] = torch.arange(16).view(4, 4).remainder(11) * 10.0  # all levels are there
    values = (lightness[:, :1] > 45).float()
    copied = ssl.VideoColorization(Levels(), PALETTE)(lightness, values)
    torch.testing.assert_close(copied, (lightness[:, 1] > 45).float(), rtol=0, atol=1e-4)
    blind = ssl.VideoColorization(torch.nn.Hardtanh(0.0, 1e-9), PALETTE)(lightness, values)
    torch.testing.assert_close(blind, values.mean().expand(1, 1, 4, 4))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be RGB, \[N, 3, H, W\], got shape \[2, 1, 4, 4\]"):
        ssl.rgb_to_lab(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="images must lie between 0 and 1, got values from 0 to 255"):
        ssl.rgb_to_lab(torch.linspace(0, 255, 48).view(1, 3, 4, 4))
    with pytest.raises(ValueError, match="spacing must be positive, got 0"):
        ssl.gamut(0)
    with pytest.raises(ValueError, match="neighbours must be between 1 and the bins, 4, got 5"):
        ssl.Bins(PALETTE, 5)
    with pytest.raises(ValueError, match="deviation must be positive, got 0"):
        ssl.Bins(PALETTE, deviation=0)
    with pytest.raises(ValueError, match=r"prior must be \[4\], the number of bins, got shape \[3\]"):
        ssl.Colorization(nn.Conv2d(1, 6, 1), 6, ssl.Bins(PALETTE), torch.ones(3))
    with pytest.raises(
        ValueError, match=r"frames must be \[N, T, 3, H, W\] with two or more, got shape \[2, 1, 3, 4, 4\]"
    ):
        ssl.VideoColorization(nn.Conv2d(1, 5, 1), PALETTE).loss(torch.rand(2, 1, 3, 4, 4))


def convs(in_channels: int, width: int = 16) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1),
        torch.nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        torch.nn.ReLU(),
    )


def striped(count: int, frames: int, seed: int, drawn: bool = True) -> tuple[Tensor, Tensor]:
    """Videos ``[count, frames, 3, 16, 16]`` of two squares that jump about over grey, and where the first one is,
    ``[count, frames, 1, 16, 16]``. The first is striped across, the second along; their colours are those of the
    palette, or drawn for each video."""
    generator = torch.Generator().manual_seed(seed)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    lightness, colors = torch.full((count, frames, 1, 16, 16), 50.0), torch.zeros(count, frames, 2, 16, 16)
    masks = torch.zeros(count, frames, 1, 16, 16)
    stripes = torch.tensor([70.0, 30.0]).repeat(3)[:, None].expand(6, 6)
    for n in range(count):
        chosen = torch.randperm(3, generator=generator)[:2] if drawn else range(2)
        for frame in range(frames):
            for thing, left in enumerate((0, 8) if number(2) else (8, 0)):
                top, left = number(11), left + number(3)
                square = (n, frame, slice(None), slice(top, top + 6), slice(left, left + 6))
                lightness[square] = stripes.T if thing else stripes
                colors[square] = PALETTE[chosen[thing]][:, None, None]
                masks[square] = 1.0 - thing
    images = ssl.lab_to_rgb(lightness.flatten(0, 1), colors.flatten(0, 1))
    return images.unflatten(0, (count, frames)), masks


def fit(model: torch.nn.Module, images: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss = model.loss(images[torch.randint(len(images), (16,), generator=order)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_learns_which_colour_a_pattern_has() -> None:
    images, unseen = (striped(count, 1, seed, drawn=False)[0].squeeze(1) for count, seed in ((100, 0), (20, 1)))
    bins = ssl.color_bins()
    model = ssl.Colorization(convs(1), 16, bins, ssl.color_prior(images, bins))
    fit(model, images, 80)
    lightness, colors = ssl.rgb_to_lab(unseen)
    _, found = ssl.rgb_to_lab(model.colorize(lightness))
    assert (found - colors).square().mean() < 0.3 * colors.square().mean()


def test_a_split_brain_learns_each_half_from_the_other() -> None:
    images, unseen = (striped(count, 1, seed, drawn=False)[0].squeeze(1) for count, seed in ((100, 0), (20, 1)))
    model = ssl.SplitBrainAutoencoder(convs(1), convs(2), 16, ssl.color_bins())
    fit(model, images, 80)
    lightness, colors = ssl.rgb_to_lab(unseen)

    def ignorance(prediction: color.ChannelPrediction, seen: Tensor, hidden: Tensor) -> float:
        """What the loss leaves to learn: 1 for a prediction that knows how often each bin occurs, 0 for the best."""
        targets = prediction.bins.shares(color.as_rows(hidden))
        best, frequent = torch.special.entr(targets).sum(1).mean(), torch.special.entr(targets.mean(0)).sum()
        with torch.no_grad():
            return ((prediction.loss(seen, hidden) - best) / (frequent - best)).item()

    assert ignorance(model.color_prediction, lightness / 50 - 1, colors) < 0.5
    assert ignorance(model.lightness_prediction, colors / 110, lightness) < 0.5


def test_it_learns_to_follow_what_it_colours() -> None:
    videos, _ = striped(64, 2, 0)
    unseen, masks = striped(32, 2, 1)
    lightness = ssl.rgb_to_lab(unseen.flatten(0, 1))[0].unflatten(0, (32, 2))
    model = ssl.VideoColorization(convs(1), PALETTE)

    def overlap() -> float:
        with torch.no_grad():
            followed = model(lightness, masks[:, :1]) > 0.5
        truth = masks[:, 1] > 0.5
        return ((followed & truth).sum() / (followed | truth).sum()).item()

    assert overlap() < 0.3
    fit(model, videos, 80)
    assert overlap() > 0.9
