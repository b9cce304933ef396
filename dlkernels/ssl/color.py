"""Colour as the label of lightness, in the CIE Lab space, through kornia.

- Colourisation: Zhang, Isola & Efros 2016, *Colorful image colorization*.
- Split-brain autoencoder: Zhang, Isola & Efros 2017, *Split-brain autoencoders*.
- Video colouring: Vondrick et al. 2018, *Tracking emerges by colorizing videos*.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, one_hot

from .. import functional as F
from .. import nn

LEAST_PROBABILITY = 1e-6


def rgb_to_lab(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images in RGB ``[N, 3, H, W]``, from 0 to 1, to lightness ``[N, 1, H, W]``, from 0 to 100, and colour (a, b)
    ``[N, 2, H, W]``, from about -108 to 98, under the illuminant D65.

    Raises:
        ModuleNotFoundError: kornia is not installed.
        ValueError: the images have not three channels, or values outside [0, 1].
    """
    from kornia import color

    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be RGB, [N, 3, H, W], got shape {list(images.shape)}")
    if not 0 <= images.min() <= images.max() <= 1:
        raise ValueError(f"images must lie between 0 and 1, got values from {images.min():.3g} to {images.max():.3g}")
    lightness, colors = color.rgb_to_lab(images).split([1, 2], 1)
    return lightness, colors


def lab_to_rgb(lightness: Tensor, colors: Tensor) -> Tensor:
    """The reverse of :func:`rgb_to_lab`; what no screen can show is clipped to [0, 1].

    Raises:
        ModuleNotFoundError: kornia is not installed.
    """
    from kornia import color

    return color.lab_to_rgb(torch.cat([lightness, colors], 1), clip=True)


def as_rows(maps: Tensor) -> Tensor:
    """``[N, C, h, w]`` to its places ``[N * h * w, C]``."""
    return maps.movedim(1, 3).flatten(0, 2)


def gamut(spacing: float = 10.0) -> Tensor:
    """Centres ``[Q, 2]`` of the squares of the (a, b) plane that hold a colour of the RGB cube.

    There are 261 at the paper's spacing of 10; its authors' own list has 313, some of which no such colour falls into.

    Raises:
        ModuleNotFoundError: kornia is not installed.
        ValueError: ``spacing`` is not positive.
    """
    if not spacing > 0:
        raise ValueError(f"spacing must be positive, got {spacing}")
    # Each (a, b) of the cube is that of a point of its surface too.
    levels, ends = torch.linspace(0, 1, 86), torch.tensor([0.0, 1.0])  # every third of 256
    channels = range(3)
    faces = [torch.cartesian_prod(*(ends if c == fixed else levels for c in channels)) for fixed in channels]
    _, colors = rgb_to_lab(torch.cat(faces).T[None, :, None])
    return spacing * (as_rows(colors) / spacing).round().unique(dim=0)


class Bins(torch.nn.Module):
    """Values, divided among the nearest of ``Q`` centres.

    Args:
        centers: ``[Q, D]``.
        neighbours: how many of the nearest centres share a value.
        deviation: of the Gaussian by whose height at their distances they share it.

    Raises:
        ValueError: ``neighbours`` is not between 1 and Q, or ``deviation`` is not positive.
    """

    centers: Tensor

    def __init__(self, centers: Tensor, neighbours: int = 1, deviation: float = 5.0) -> None:
        super().__init__()
        if not 1 <= neighbours <= len(centers):
            raise ValueError(f"neighbours must be between 1 and the bins, {len(centers)}, got {neighbours}")
        if not deviation > 0:
            raise ValueError(f"deviation must be positive, got {deviation}")
        self.neighbours, self.deviation = neighbours, deviation
        self.register_buffer("centers", centers)

    def __len__(self) -> int:
        return len(self.centers)

    def nearest(self, values: Tensor) -> Tensor:
        """Values ``[M, D]`` to the number of the nearest centre, ``[M]``."""
        return self._distances(values).argmin(1)

    def shares(self, values: Tensor) -> Tensor:
        """Values ``[M, D]`` to the share of each centre in each, ``[M, Q]``, of sum 1 (soft encoding)."""
        distances, nearest = self._distances(values).topk(self.neighbours, 1, largest=False)
        shares = torch.softmax(-distances.square() / (2 * self.deviation**2), 1)  # [M, neighbours]
        return shares.new_zeros(len(values), len(self)).scatter_(1, nearest, shares)

    def _distances(self, values: Tensor) -> Tensor:
        # Differences, not products, which would leave few right digits of small distances.
        return torch.cdist(values, self.centers, compute_mode="donot_use_mm_for_euclid_dist")


def rebalancing(prior: Tensor, uniform_share: float = 0.5) -> Tensor:
    """Weights ``[Q]`` of bins of probabilities ``prior`` ``[Q]``: the rarer, the heavier, with mean 1 (equation 4).

    Args:
        uniform_share: of the uniform distribution that the prior is mixed with.
    """
    weights = 1 / ((1 - uniform_share) * prior + uniform_share / len(prior))
    return weights / (prior * weights).sum()


class ChannelPrediction(torch.nn.Module):
    """Some channels of an image from the others, as a classification at each place of a map.

    Args:
        network: any module from the channels that are seen to ``[N, features, h, w]``.
        features: how many features the network gives.
        bins: what the other channels are divided into.
        prior: probabilities ``[Q]`` of the bins, by which :func:`rebalancing` weights them; without it all weigh 1.

    Raises:
        ValueError: ``prior`` is not ``[Q]``.
    """

    weights: Tensor

    def __init__(self, network: torch.nn.Module, features: int, bins: Bins, prior: Tensor | None = None) -> None:
        super().__init__()
        if prior is not None and prior.shape != (len(bins),):
            raise ValueError(f"prior must be [{len(bins)}], the number of bins, got shape {list(prior.shape)}")
        self.network, self.bins = network, bins
        self.classifier = nn.Linear(features, len(bins))
        self.register_buffer("weights", torch.ones(len(bins)) if prior is None else rebalancing(prior))

    def forward(self, seen: Tensor) -> Tensor:
        """Logits ``[N, Q, h, w]`` of the channels that are not seen."""
        return self.classifier(self.network(seen).movedim(1, 3)).movedim(3, 1)

    def loss(self, seen: Tensor, hidden: Tensor) -> Tensor:
        """Mean over all places of the cross-entropy, times the weight of the bin that ``hidden`` ``[N, D, H, W]``,
        averaged to h x w, is in. The logits are never in memory, their targets are."""
        features = self.network(seen)  # [N, features, h, w]
        targets = self.bins.shares(as_rows(adaptive_avg_pool2d(hidden, features.shape[2:])))  # [N * h * w, Q]
        weight, bias = self.classifier.weight, self.classifier.bias
        losses = F.linear_cross_entropy(as_rows(features), weight, targets, linear_bias=bias, reduction="none")
        return (losses * self.weights[targets.argmax(1)]).mean()


def color_bins(spacing: float = 10.0) -> Bins:
    """The :func:`gamut`, each colour shared by its five nearest centres."""
    return Bins(gamut(spacing), neighbours=5, deviation=5.0)


def color_prior(images: Tensor, bins: Bins) -> Tensor:
    """How often each of ``bins`` occurs in RGB ``images``, smoothed by their Gaussian: probabilities ``[Q]``."""
    return bins.shares(as_rows(rgb_to_lab(images)[1])).mean(0)


class Colorization(torch.nn.Module):
    """The colours of an image from its lightness, as a classification, in which rare colours count more.

    Args:
        network: any module from lightness ``[N, 1, H, W]``, from -1 to 1, to ``[N, features, h, w]``.
        features: how many features the network gives.
        bins: what colours are divided into, as of :func:`color_bins`.
        prior: how often each bin occurs, as of :func:`color_prior`; without it all count alike.

    Raises:
        ValueError: ``prior`` does not fit the bins.
    """

    def __init__(self, network: torch.nn.Module, features: int, bins: Bins, prior: Tensor | None = None) -> None:
        super().__init__()
        self.prediction = ChannelPrediction(network, features, bins, prior)

    def forward(self, lightness: Tensor) -> Tensor:
        """Lightness ``[N, 1, H, W]``, from 0 to 100, to logits of the bins ``[N, Q, h, w]``."""
        return self.prediction(lightness / 50 - 1)

    def loss(self, images: Tensor) -> Tensor:
        """Mean weighted cross-entropy of the colours of RGB ``images``."""
        lightness, colors = rgb_to_lab(images)
        return self.prediction.loss(lightness / 50 - 1, colors)

    @torch.no_grad()
    def colorize(self, lightness: Tensor, temperature: float = 0.38) -> Tensor:
        """Lightness ``[N, 1, H, W]`` to images in RGB, whose colours are the mean of the bins under the annealed
        distribution (section 2.3): between the likeliest colour, at temperature 0, and the greyish mean, at 1."""
        probabilities = torch.softmax(self(lightness) / temperature, 1)
        colors = torch.einsum("nqhw,qd->ndhw", probabilities, self.prediction.bins.centers)
        return lab_to_rgb(lightness, interpolate(colors, lightness.shape[2:], mode="bilinear"))


class SplitBrainAutoencoder(torch.nn.Module):
    """Two networks, one for colours from lightness, one for lightness from colours; their features, side by side, are
    those of the whole image.

    Args:
        lightness_network: any module from lightness ``[N, 1, H, W]``, from -1 to 1, to ``[N, features, h, w]``.
        color_network: any module from colours ``[N, 2, H, W]``, about -1 to 1, to ``[N, features, h, w]``.
        features: how many features each gives.
        bins: what colours are divided into, as of :func:`color_bins`; lightness is divided into 100.
    """

    def __init__(
        self, lightness_network: torch.nn.Module, color_network: torch.nn.Module, features: int, bins: Bins
    ) -> None:
        super().__init__()
        self.color_prediction = ChannelPrediction(lightness_network, features, bins)
        self.lightness_prediction = ChannelPrediction(
            color_network, features, Bins(torch.arange(100).add(0.5)[:, None])
        )

    def forward(self, images: Tensor) -> Tensor:
        """RGB images to the features of both networks, ``[N, 2 * features, h, w]``."""
        lightness, colors = rgb_to_lab(images)
        seen = ((self.color_prediction, lightness / 50 - 1), (self.lightness_prediction, colors / 110))
        return torch.cat([prediction.network(channels) for prediction, channels in seen], 1)

    def loss(self, images: Tensor) -> Tensor:
        """The cross-entropy of colours from lightness, plus that of lightness from colours."""
        lightness, colors = rgb_to_lab(images)
        return self.color_prediction.loss(lightness / 50 - 1, colors) + self.lightness_prediction.loss(
            colors / 110, lightness
        )


class VideoColorization(torch.nn.Module):
    """The colours of a frame, copied from the frames before: each place points, by attention, to where it was.

    Pointers that carry colours carry anything: :meth:`forward` tracks what is marked in the first frames.

    Args:
        encoder: any module from lightness ``[N, 1, H, W]``, from -1 to 1, to features ``[N, D, h, w]``.
        palette: colours (a, b) that all are rounded to, ``[K, 2]``; the paper takes 16, by k-means.
    """

    def __init__(self, encoder: torch.nn.Module, palette: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.palette = Bins(palette)

    def forward(self, lightness: Tensor, values: Tensor) -> Tensor:
        """Copies values of the first frames to the last.

        Args:
            lightness: of all frames, ``[N, T, 1, H, W]``, from 0 to 100.
            values: of all but the last, ``[N, T - 1, V, H, W]``, averaged to h x w.

        Returns:
            ``[N, V, h, w]``: at each place the mean of the values, weighted by its attention to theirs.
        """
        features = self._encode(lightness)
        height, width = features.shape[3:]
        maps = adaptive_avg_pool2d(values.flatten(0, 1), (height, width)).unflatten(0, values.shape[:2])
        return self._copied(features, maps)

    def loss(self, frames: Tensor) -> Tensor:
        """Mean cross-entropy of the last frame's colours, given the others' in RGB ``frames`` ``[N, T, 3, H, W]``.

        Raises:
            ValueError: there is nothing to copy from.
        """
        if frames.dim() != 5 or frames.shape[1] < 2:
            raise ValueError(f"frames must be [N, T, 3, H, W] with two or more, got shape {list(frames.shape)}")
        lightness, colors = rgb_to_lab(frames.flatten(0, 1))
        features = self._encode(lightness.unflatten(0, frames.shape[:2]))  # [N, T, D, h, w]
        height, width = features.shape[3:]
        rounded = self.palette.nearest(as_rows(adaptive_avg_pool2d(colors, (height, width))))
        rounded = rounded.unflatten(0, (*frames.shape[:2], height, width))  # [N, T, h, w]
        values = one_hot(rounded[:, :-1], len(self.palette)).movedim(4, 2).to(features.dtype)  # [N, T - 1, K, h, w]
        # Probabilities, of which the logarithms are logits; no colour that is nowhere in the first frames costs more.
        logits = self._copied(features, values).clamp_min(LEAST_PROBABILITY).log()  # [N, K, h, w]
        return F.cross_entropy(logits, rounded[:, -1])

    def _encode(self, lightness: Tensor) -> Tensor:
        return self.encoder(lightness.flatten(0, 1) / 50 - 1).unflatten(0, lightness.shape[:2])

    def _copied(self, features: Tensor, values: Tensor) -> Tensor:
        """``features`` ``[N, T, D, h, w]`` and ``values`` ``[N, T - 1, V, h, w]`` to ``[N, V, h, w]``."""
        places = features.movedim(2, 4)  # [N, T, h, w, D]
        queries, keys = places[:, -1].flatten(1, 2), places[:, :-1].flatten(1, 3)  # [N, h * w, D], [N, (T - 1) h w, D]
        copied = F.scaled_dot_product_attention(queries, keys, values.movedim(2, 4).flatten(1, 3), scale=1.0)
        return copied.unflatten(1, features.shape[3:]).movedim(3, 1)
