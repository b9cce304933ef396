"""Pretext tasks: the labels that images give themselves, puzzles that can be put together again, and what is learnt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlkernels import models, nn, ssl
from dlkernels.ssl import pretext

from .cases.self_supervision import FEATURES, conv_encoder, digits, pretrain, probe


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


def numbered(count: int, channels: int, size: int) -> Tensor:
    """Images in which no two pixels are alike."""
    return torch.arange(count * channels * size * size).float().view(count, channels, size, size)


def patch_encoder(width: int = 32) -> torch.nn.Sequential:
    """Two convolutions without batch norm: patches and tiles to ``[N, 8 * width]``."""
    return torch.nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        torch.nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
    )


def test_squares_are_those_asked_for() -> None:
    images = numbered(3, 2, 6)
    top, left = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 3])
    expected = torch.stack([images[0, :, 0:3, 2:5], images[1, :, 3:6, 0:3], images[2, :, 1:4, 3:6]])
    assert torch.equal(pretext.squares(images, top, left, 3), expected)


def test_turns_are_counted_and_a_turn_back_restores_the_image() -> None:
    images = numbered(3, 2, 4)
    turned, turns = pretext.rotated(images)
    assert turns.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for image, turn, original in zip(turned, turns.tolist(), images.repeat(4, 1, 1, 1), strict=True):
        assert torch.equal(image.rot90(-turn, (1, 2)), original)
    assert len({tuple(image.flatten().tolist()) for image in turned}) == 12


def test_the_loss_of_rotation_is_over_all_turns() -> None:
    model = ssl.RotationPrediction(torch.nn.Flatten(), 2 * 4 * 4)
    images = torch.randn(3, 2, 4, 4)
    losses = [-model(images.rot90(turns, (2, 3))).log_softmax(1)[:, turns].mean() for turns in range(4)]
    torch.testing.assert_close(model.loss(images), torch.stack(losses).mean())


@pytest.mark.parametrize("jitter", [0, 2])
def test_a_neighbour_is_where_it_is_said_to_be(jitter: int) -> None:
    model = ssl.RelativePatchLocation(torch.nn.Flatten(), 9, 3, 2, jitter)
    size = 3 + 2 * (5 + jitter)
    images = numbered(1, 1, size + 3).expand(500, -1, -1, -1)
    first, second, place = model.patches(images)
    assert first.shape == second.shape == (500, 1, 3, 3)
    assert set(place.tolist()) == set(range(8))
    directions = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]
    corners = [
        torch.stack([patch[:, 0, 0, 0] // (size + 3), patch[:, 0, 0, 0] % (size + 3)], 1) for patch in (first, second)
    ]
    shift = corners[1] - corners[0] - 5 * torch.tensor(directions)[place]
    assert shift.abs().max() == jitter
    assert len(corners[0].unique(dim=0)) == 16  # everywhere that neighbours leave room
    assert torch.equal(first, pretext.squares(images, *corners[0].T.long(), 3))


def test_permutations_are_chosen_greedily_by_their_distance() -> None:
    chosen = ssl.distant_permutations(4, 10, torch.Generator().manual_seed(0)).tolist()
    assert len({tuple(permutation) for permutation in chosen}) == 10
    assert all(sorted(permutation) == [0, 1, 2, 3] for permutation in chosen)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    every = every[[len(set(row.tolist())) == 4 for row in every]]  # all 24
    for count in range(1, 10):
        before = torch.tensor(chosen[:count])
        distances = (every[:, None] != before).sum((1, 2))
        free = [row.tolist() not in chosen[:count] for row in every]
        own = (torch.tensor(chosen[count]) != before).sum()
        assert own == distances[free].max()


def test_permutations_of_nine_tiles_differ_in_nearly_all_places() -> None:
    permutations = ssl.distant_permutations(9, 30)
    distances = (permutations[:, None] != permutations).sum(2)[~torch.eye(30, dtype=torch.bool)]
    assert len(permutations.unique(dim=0)) == 30
    assert distances[: 9 * 8].float().mean() > 8
    assert distances.float().mean() >= 8.0  # of permutations at random: 8 on average
    assert (permutations[:9, None] != permutations[:9]).sum(2).sum() == 9 * 8 * 9  # nine that agree nowhere
    assert len(ssl.distant_permutations(3, 6).unique(dim=0)) == 6  # all there are


@pytest.mark.parametrize("grid", [2, 3])
def test_the_inverse_of_a_permutation_restores_the_image(grid: int) -> None:
    images = numbered(5, 2, 2 * grid)
    tiles = pretext.split_into_tiles(images, grid)
    assert tiles.shape == (5, grid**2, 2, 2, 2)
    assert torch.equal(tiles[1, grid], images[1, :, 2:4, 0:2])  # the first of the second row
    permutations = torch.stack([torch.randperm(grid**2) for _ in range(5)])
    mixed = pretext.permuted(tiles, permutations)
    assert not torch.equal(mixed, tiles)
    assert torch.equal(mixed[2, 1], tiles[2, permutations[2, 1]])
    assert torch.equal(pretext.join_tiles(pretext.permuted(mixed, permutations.argsort(1))), images)


def test_tiles_lie_anywhere_in_their_cells_and_are_normalised() -> None:
    model = ssl.Jigsaw(torch.nn.Flatten(), 4, ssl.distant_permutations(9, 5), 2)
    images = torch.randn(300, 2, 12, 12)
    tiles = model.tiles(images)
    assert tiles.shape == (300, 9, 2, 2, 2)
    torch.testing.assert_close(tiles.mean((2, 3, 4)), torch.zeros(300, 9), rtol=0, atol=1e-5)
    torch.testing.assert_close(tiles.std((2, 3, 4), correction=0), torch.ones(300, 9), rtol=1e-3, atol=0)
    places = set()
    for tile in range(9):
        top, left = 4 * (tile // 3), 4 * (tile % 3)
        for row in range(3):
            for column in range(3):
                square = images[:, :, top + row : top + row + 2, left + column : left + column + 2]
                square = (square - square.mean((1, 2, 3), keepdim=True)) / square.std(
                    (1, 2, 3), correction=0, keepdim=True
                )
                found = torch.isclose(square, tiles[:, tile], rtol=1e-3, atol=1e-3).all(dim=3).all(dim=2).all(dim=1)
                places |= {(tile, row, column)} if found.any() else set()
    assert len(places) == 81
    assert torch.isfinite(model.tiles(torch.ones(2, 2, 12, 12))).all()


def test_a_hole_is_filled_and_all_else_left() -> None:
    model = ssl.Inpainting(12, 2, 4, 6, (4, 8)).eval()
    images = torch.randn(5, 2, 12, 12)
    top, left = torch.tensor([0, 8, 3, 4, 1]), torch.tensor([8, 0, 2, 4, 7])
    filled = model(images, top, left)
    changed = (filled != images).any(1)
    assert torch.equal(changed.sum((1, 2)), torch.full((5,), 16))
    for n in range(5):
        assert changed[n, top[n] : top[n] + 4, left[n] : left[n] + 4].all()
    inside = images.clone()
    for n in range(5):
        inside[n, :, top[n] : top[n] + 4, left[n] : left[n] + 4] = 99.0
    assert torch.equal(model(inside, top, left), filled)  # what was there is not looked at


def test_holes_are_drawn_everywhere() -> None:
    model = ssl.Inpainting(8, 1, 4, 6, (4, 8))
    top, left = model.holes(torch.zeros(500, 1, 8, 8))
    assert set(zip(top.tolist(), left.tolist(), strict=True)) == {
        (row, column) for row in range(5) for column in range(5)
    }


def test_the_losses_of_inpainting_are_those_of_the_filling_and_its_discriminator() -> None:
    model = ssl.Inpainting(8, 1, 4, 6, (4, 8), adversarial_share=0.25).double().eval()
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    top, left = model.holes(images)
    filling, original = (pretext.squares(x, top, left, 4) for x in (model(images, top, left), images))
    real, fake = model.discriminator(original).sigmoid(), model.discriminator(filling).sigmoid()
    torch.manual_seed(1)
    expected = 0.75 * (filling - original).square().mean() - 0.25 * fake.log().mean()
    torch.testing.assert_close(model.loss(images), expected)
    torch.manual_seed(1)
    loss = model.discriminator_loss(images)
    torch.testing.assert_close(loss, -real.log().mean() - (1 - fake).log().mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())
    model.loss(images).backward()
    assert all(parameter.grad is not None for parameter in model.generator.parameters())


def test_losses_of_a_guess_are_logarithms_of_the_number_of_answers() -> None:
    images = torch.randn(6, 1, 9, 9)
    permutations = ssl.distant_permutations(9, 20)
    for model, answers in (
        (ssl.RotationPrediction(torch.nn.Flatten(), 81), 4),
        (ssl.RelativePatchLocation(torch.nn.Flatten(), 4, 2, 1), 8),
        (ssl.Jigsaw(torch.nn.Flatten(), 4, permutations, 2), 20),
    ):
        last = model.classifier if isinstance(model.classifier, nn.Linear) else model.classifier[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        assert model.loss(images).item() == pytest.approx(math.log(answers))


def test_what_does_not_fit_is_refused() -> None:
    flat, wide = torch.nn.Flatten(), torch.zeros(2, 1, 8, 9)
    nine, four = ssl.distant_permutations(9, 3), ssl.distant_permutations(4, 3)
    for model in (
        ssl.RotationPrediction(flat, 72),
        ssl.RelativePatchLocation(flat, 4, 2, 1),
        ssl.Jigsaw(flat, 4, four, 2),
    ):
        with pytest.raises(ValueError, match=r"images must be \[N, C, S, S\], got shape \[2, 1, 8, 9\]"):
            model.loss(wide)
    with pytest.raises(ValueError, match="images must be at least 10 pixels wide for patches and gaps, got 8"):
        ssl.RelativePatchLocation(flat, 4, 2, 1, 1).loss(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="jitter must be between 0 and the gap, 1, got 2"):
        ssl.RelativePatchLocation(flat, 4, 2, 1, 2)
    with pytest.raises(ValueError, match="patch_size must be positive, got 0"):
        ssl.RelativePatchLocation(flat, 4, 0, 1)
    for size in (8, 3):
        with pytest.raises(ValueError, match=f"images must be a multiple of 3, at least 6, pixels wide, got {size}"):
            ssl.Jigsaw(flat, 4, nine, 2).loss(torch.zeros(2, 1, size, size))
    with pytest.raises(ValueError, match="permutations must be of a square number of tiles, got 3"):
        ssl.Jigsaw(flat, 4, ssl.distant_permutations(3, 2), 2)
    with pytest.raises(ValueError, match="tile_size must be positive, got 0"):
        ssl.Jigsaw(flat, 4, nine, 0)
    for tiles, count, message in (
        (10, 5, "tiles must be from 2 to 9, got 10"),
        (3, 7, "count must be from 2 to 3! = 6, got 7"),
        (3, 1, "count must be from 2 to 3! = 6, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ssl.distant_permutations(tiles, count)
    for hole_size in (0, 6, 8):
        with pytest.raises(
            ValueError, match=f"a positive multiple of 4 less than the image's size, 8, got {hole_size}"
        ):
            ssl.Inpainting(8, 1, hole_size)
    with pytest.raises(ValueError, match="adversarial_share must be between 0 and 1, got 2"):
        ssl.Inpainting(8, 1, 4, adversarial_share=2)
    with pytest.raises(ValueError, match="images must be wider than the hole, 4, got 4"):
        ssl.Inpainting(8, 1, 4).loss(torch.zeros(2, 1, 4, 4))


def test_it_learns_which_way_up_digits_are() -> None:
    model = ssl.RotationPrediction(conv_encoder(), FEATURES)
    pretrain(model.loss, model.parameters(), 5)
    with torch.no_grad():
        turned, turns = pretext.rotated(digits().test_images)
        assert (model.eval()(turned).argmax(1) == turns).float().mean() >= 0.85


def test_it_learns_where_in_a_digit_a_patch_is() -> None:
    model = ssl.RelativePatchLocation(patch_encoder(), 256, 2, 1, 0, 128)
    pretrain(model.loss, model.parameters(), 10, 3e-3)
    with torch.no_grad():
        first, second, place = model.eval().patches(digits().test_images)
        assert (model(first, second).argmax(1) == place).float().mean() >= 0.35  # a guess: 0.125


def test_it_learns_to_put_the_quarters_of_digits_in_order() -> None:
    model = ssl.Jigsaw(patch_encoder(), 256, ssl.distant_permutations(4, 24), 4, 128)
    pretrain(model.loss, model.parameters(), 10, 3e-3)
    with torch.no_grad():
        tiles = model.eval().tiles(digits().test_images)
        chosen = torch.randint(24, (len(tiles),))
        answers = model(pretext.permuted(tiles, model.permutations[chosen])).argmax(1)
        assert (answers == chosen).float().mean() >= 0.6  # a guess: 0.04


def test_a_probe_of_a_denoising_autoencoder_beats_a_random_encoder() -> None:
    model = models.Autoencoder(8, 1, 64, (16, 32), noise=0.5)
    before = probe(model.encoder)
    pretrain(model.loss, model.parameters(), 12)
    assert probe(model.encoder) >= before + 0.02


def test_holes_in_digits_are_filled_in_and_a_probe_beats_a_random_encoder() -> None:
    model = ssl.Inpainting(8, 1, 4, 64, (16, 32))
    encoder = model.generator.encoder
    before = probe(encoder)
    players = [
        (model.discriminator_loss, torch.optim.Adam(model.discriminator.parameters(), 1e-3, betas=(0.5, 0.999))),
        (model.loss, torch.optim.Adam(model.generator.parameters(), 5e-3)),
    ]
    order = torch.Generator().manual_seed(0)
    images = digits().train_images
    for _ in range(15):
        for chosen in torch.randperm(len(images), generator=order).split(128):
            for loss, optimizer in players:
                value = loss(images[chosen])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
    assert probe(encoder) >= before + 0.02

    images = digits().test_images
    with torch.no_grad():
        top, left = model.eval().holes(images)
        filling, original = (pretext.squares(x, top, left, 4) for x in (model(images, top, left), images))
        mean = digits().train_images.mean(0).expand_as(images)
        guess = pretext.squares(mean, top, left, 4)  # what is there in digits on average
    assert (filling - original).square().mean() < 0.7 * (guess - original).square().mean()
