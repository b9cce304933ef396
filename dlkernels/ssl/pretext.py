"""Pretext tasks: what an image tells about itself is the label.

- Rotation: Gidaris, Singh & Komodakis 2018, *Unsupervised representation learning by predicting image rotations*.
- Relative patch location: Doersch, Gupta & Efros 2015, *Unsupervised visual representation learning by context
  prediction*.
- Jigsaw: Noroozi & Favaro 2016, *Unsupervised learning of visual representations by solving jigsaw puzzles*.
- Inpainting: Pathak et al. 2016, *Context encoders: feature learning by inpainting*.

Denoising (Vincent et al. 2010) needs nothing more than :class:`dlkernels.models.Autoencoder` with ``noise``; its
``encoder`` gives the features.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from .. import functional as F
from .. import models, nn


def image_size_of(images: Tensor) -> int:
    """Height and width of ``images``.

    Raises:
        ValueError: they are not ``[N, C, S, S]``.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be [N, C, S, S], got shape {list(images.shape)}")
    return images.shape[3]


def squares(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Of each image the square ``[C, size, size]`` whose upper left pixel is in row ``top`` ``[N]`` and column
    ``left`` ``[N]``."""
    offsets = torch.arange(size, device=images.device)
    rows = (top[:, None] + offsets)[:, None, :, None]  # [N, 1, size, 1]
    columns = (left[:, None] + offsets)[:, None, None, :]  # [N, 1, 1, size]
    number = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[number, channel, rows, columns]


def rotated(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images ``[N, C, S, S]`` turned by 0, 1, 2 and 3 quarters, ``[4 N, C, S, S]``, and by how many, ``[4 N]``."""
    turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


class RotationPrediction(torch.nn.Module):
    """By how many quarters is an image turned?

    Args:
        encoder: any module from images to ``[N, features]``.
        features: how many features the encoder gives.
    """

    def __init__(self, encoder: torch.nn.Module, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(features, 4)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, 4]``."""
        return self.classifier(self.encoder(images))

    def loss(self, images: Tensor) -> Tensor:
        """Mean cross-entropy over all four turns of each image.

        Raises:
            ValueError: the images are not square.
        """
        image_size_of(images)
        turned, turns = rotated(images)
        return F.cross_entropy(self(turned), turns)


class RelativePatchLocation(torch.nn.Module):
    """Which of its eight neighbours is a second patch of an image?

    Args:
        encoder: any module from patches ``[N, C, patch_size, patch_size]`` to ``[N, features]``.
        features: how many features the encoder gives.
        patch_size: height and width of a patch.
        gap: pixels between neighbours, so that no edge tells by going on.
        jitter: most pixels by which a neighbour is moved at random, up to ``gap``.
        hidden_features: of the classifier of both patches' features.

    Raises:
        ValueError: ``patch_size`` is not positive, or ``jitter`` is not between 0 and ``gap``.
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        features: int,
        patch_size: int,
        gap: int,
        jitter: int = 0,
        hidden_features: int = 512,
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be positive, got {patch_size}")
        if not 0 <= jitter <= gap:
            raise ValueError(f"jitter must be between 0 and the gap, {gap}, got {jitter}")
        self.encoder = encoder
        self.patch_size, self.gap, self.jitter = patch_size, gap, jitter
        self.classifier = nn.Sequential(
            nn.Linear(2 * features, hidden_features), torch.nn.ReLU(), nn.Linear(hidden_features, 8)
        )

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of each image a patch and a neighbour, ``[N, C, patch_size, patch_size]``, and which one it is, ``[N]``
        from 0, row by row.

        Raises:
            ValueError: the images are not square, or too small for three patches in a row.
        """
        image_size = image_size_of(images)
        step = self.patch_size + self.gap
        margin = step + self.jitter
        if image_size < self.patch_size + 2 * margin:
            smallest = self.patch_size + 2 * margin
            raise ValueError(f"images must be at least {smallest} pixels wide for patches and gaps, got {image_size}")
        count, device = len(images), images.device
        corner = torch.randint(margin, image_size - self.patch_size - margin + 1, (2, count), device=device)
        place = torch.randint(8, (count,), device=device)
        cell = place + (place >= 4)  # of the 3 x 3 around the patch, which is itself the fifth
        direction = torch.stack([cell // 3, cell % 3]) - 1
        shift = torch.randint(-self.jitter, self.jitter + 1, (2, count), device=device)
        neighbour = corner + step * direction + shift
        first, second = (squares(images, top, left, self.patch_size) for top, left in (corner, neighbour))
        return first, second, place

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits ``[N, 8]`` of where ``second`` is, seen from ``first``."""
        features = self.encoder(torch.cat([first, second]))  # [2 N, features]
        return self.classifier(torch.cat(features.chunk(2), 1))

    def loss(self, images: Tensor) -> Tensor:
        """Mean cross-entropy over one pair of patches of each image."""
        first, second, place = self.patches(images)
        return F.cross_entropy(self(first, second), place)


def split_into_tiles(images: Tensor, grid: int) -> Tensor:
    """Images ``[N, C, S, S]`` to their tiles, row by row, ``[N, grid^2, C, S / grid, S / grid]``."""
    rows = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # [N, C, grid, S / grid, grid, S / grid]
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def join_tiles(tiles: Tensor) -> Tensor:
    """Tiles ``[N, grid^2, C, s, s]`` to the images that they are of, ``[N, C, grid s, grid s]``."""
    grid = math.isqrt(tiles.shape[1])
    return tiles.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def permuted(tiles: Tensor, permutations: Tensor) -> Tensor:
    """Puts tile ``permutations[n, i]`` of image n in place i; ``permutations.argsort(1)`` puts it back.

    Args:
        tiles: ``[N, tiles, ...]``.
        permutations: ``[N, tiles]``.
    """
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], permutations]


def distant_permutations(tiles: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` permutations ``[count, tiles]`` that differ in many places (algorithm 1 of Noroozi & Favaro).

    The first is drawn at random; each of the others has the greatest sum of Hamming distances to those chosen before,
    the first in alphabetical order where several have.

    Args:
        tiles: how many things are permuted, at most nine.
        count: how many permutations, at least two.
        generator: draws the first; torch's default if not given.

    Raises:
        ValueError: there are not so many permutations, or too many to go through.
    """
    if not 2 <= tiles <= 9:
        raise ValueError(f"tiles must be from 2 to 9, got {tiles}")
    if not 2 <= count <= math.factorial(tiles):
        raise ValueError(f"count must be from 2 to {tiles}! = {math.factorial(tiles)}, got {count}")
    every = torch.from_numpy(np.array(list(itertools.permutations(range(tiles))), dtype=np.int8))  # [tiles!, tiles]
    distances = torch.zeros(len(every), dtype=torch.int64)  # sums, to those chosen
    chosen = [int(torch.randint(len(every), (), generator=generator))]
    for _ in range(count - 1):
        distances += (every != every[chosen[-1]]).sum(1)
        distances[chosen[-1]] = -len(every) * tiles  # never again
        chosen.append(int(distances.argmax()))
    return every[chosen].long()


class Jigsaw(torch.nn.Module):
    """By which of a set of permutations are the tiles of an image out of order?

    Each tile is a square drawn from its cell of the grid and normalised by itself, so that neither edges nor colours
    that go on tell the answer.

    Args:
        encoder: any module from tiles ``[M, C, tile_size, tile_size]`` to ``[M, features]``.
        features: how many features the encoder gives.
        permutations: the set, ``[P, grid^2]``, as of :func:`distant_permutations`.
        tile_size: height and width of a tile.
        hidden_features: of the classifier of all tiles' features.

    Raises:
        ValueError: the permutations are not of a square number of tiles, or ``tile_size`` is not positive.
    """

    permutations: Tensor

    def __init__(
        self,
        encoder: torch.nn.Module,
        features: int,
        permutations: Tensor,
        tile_size: int,
        hidden_features: int = 512,
    ) -> None:
        super().__init__()
        count, tiles = permutations.shape
        self.grid = math.isqrt(tiles)
        if self.grid**2 != tiles:
            raise ValueError(f"permutations must be of a square number of tiles, got {tiles}")
        if tile_size < 1:
            raise ValueError(f"tile_size must be positive, got {tile_size}")
        self.encoder = encoder
        self.tile_size = tile_size
        self.register_buffer("permutations", permutations)
        self.classifier = nn.Sequential(
            nn.Linear(tiles * features, hidden_features), torch.nn.ReLU(), nn.Linear(hidden_features, count)
        )

    def tiles(self, images: Tensor) -> Tensor:
        """Draws a tile from each cell of the grid, in order: ``[N, grid^2, C, tile_size, tile_size]``.

        Raises:
            ValueError: the images are not square, no multiple of the grid, or too small for the tiles.
        """
        image_size = image_size_of(images)
        if image_size % self.grid != 0 or image_size < self.grid * self.tile_size:
            expected = f"a multiple of {self.grid}, at least {self.grid * self.tile_size}"
            raise ValueError(f"images must be {expected}, pixels wide, got {image_size}")
        cells = split_into_tiles(images, self.grid)  # [N, grid^2, C, S / grid, S / grid]
        places = image_size // self.grid - self.tile_size + 1
        top, left = torch.randint(places, (2, cells.shape[0] * cells.shape[1]), device=images.device)
        tiles = squares(cells.flatten(0, 1), top, left, self.tile_size)
        deviation, mean = torch.std_mean(tiles, (1, 2, 3), correction=0, keepdim=True)
        return ((tiles - mean) / (deviation + 1e-5)).unflatten(0, cells.shape[:2])

    def forward(self, tiles: Tensor) -> Tensor:
        """Logits ``[N, P]`` of the permutation that tiles ``[N, grid^2, C, tile_size, tile_size]`` are in."""
        features = self.encoder(tiles.flatten(0, 1))  # [N * grid^2, features]
        return self.classifier(features.unflatten(0, tiles.shape[:2]).flatten(1))

    def loss(self, images: Tensor) -> Tensor:
        """Mean cross-entropy over one permutation of each image."""
        chosen = torch.randint(len(self.permutations), (len(images),), device=images.device)
        return F.cross_entropy(self(permuted(self.tiles(images), self.permutations[chosen])), chosen)


class Inpainting(torch.nn.Module):
    """What was in the hole? An autoencoder fills it, by the error of its pixels and by a discriminator, which sees the
    filling alone and is to tell it from what was there. Two optimisers lower :meth:`loss`, by the parameters of
    ``generator``, and :meth:`discriminator_loss`, by those of ``discriminator``, in turns.

    Args:
        image_size: height and width S of the images, a multiple of 4.
        in_channels: channels of the images, whose mean should be near 0, which the hole is filled with.
        hole_size: height and width of the hole, a multiple of 4.
        code_features: size of the autoencoder's code, the features.
        widths: channels of autoencoder and discriminator after the first and the second halving.
        adversarial_share: of the discriminator's verdict in the loss.

    Raises:
        ValueError: a size is not a positive multiple of 4, the hole is no smaller than the image, or
            ``adversarial_share`` is outside [0, 1].
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        hole_size: int,
        code_features: int = 128,
        widths: tuple[int, int] = (32, 64),
        adversarial_share: float = 0.001,
    ) -> None:
        super().__init__()
        if hole_size < 4 or hole_size % 4 != 0 or hole_size >= image_size:
            expected = f"a positive multiple of 4 less than the image's size, {image_size}"
            raise ValueError(f"hole_size must be {expected}, got {hole_size}")
        if not 0 <= adversarial_share <= 1:
            raise ValueError(f"adversarial_share must be between 0 and 1, got {adversarial_share}")
        self.hole_size, self.adversarial_share = hole_size, adversarial_share
        self.generator = models.Autoencoder(image_size, in_channels, code_features, widths)
        self.discriminator = models.GAN(hole_size, in_channels, widths=widths).discriminator

    def holes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of each image the row and the column of a hole's upper left pixel, ``[N]`` each.

        Raises:
            ValueError: the images are not square, or no larger than the hole.
        """
        image_size = image_size_of(images)
        if image_size <= self.hole_size:
            raise ValueError(f"images must be wider than the hole, {self.hole_size}, got {image_size}")
        top, left = torch.randint(image_size - self.hole_size + 1, (2, len(images)), device=images.device)
        return top, left

    def forward(self, images: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """Images with the holes at ``top`` and ``left`` filled; what is in the holes is not looked at."""
        hole = self._mask(images, top, left)
        return torch.where(hole, self.generator(images.masked_fill(hole, 0.0)), images)

    def loss(self, images: Tensor) -> Tensor:
        """The generator's: squared error of the filling, and -log D(filling), averaged and weighted."""
        filling, original = self._filled(images)
        adversarial = torch_functional.softplus(-self.discriminator(filling)).mean()
        error = torch_functional.mse_loss(filling, original)
        return (1 - self.adversarial_share) * error + self.adversarial_share * adversarial

    def discriminator_loss(self, images: Tensor) -> Tensor:
        """-log D(original) - log(1 - D(filling)), averaged; no gradient reaches the generator."""
        with torch.no_grad():
            filling, original = self._filled(images)
        real, fake = self.discriminator(original), self.discriminator(filling)
        return torch_functional.softplus(-real).mean() + torch_functional.softplus(fake).mean()

    def _filled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is drawn in holes at random, and what was there: ``[N, C, hole_size, hole_size]``."""
        top, left = self.holes(images)
        filled = self(images, top, left)
        filling, original = (squares(x, top, left, self.hole_size) for x in (filled, images))
        return filling, original

    def _mask(self, images: Tensor, top: Tensor, left: Tensor) -> Tensor:
        """True in the holes, ``[N, 1, S, S]``."""
        pixels = torch.arange(images.shape[3], device=images.device)
        rows, columns = (
            (pixels >= first[:, None]) & (pixels < first[:, None] + self.hole_size) for first in (top, left)
        )
        return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
