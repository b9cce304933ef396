"""Class images: what the network would most like to see, by gradient ascent on the score (Simonyan et al. 2014, section
2), kept natural by blurring and clipping (Yosinski et al. 2015, section 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .figures import grid, near_square, show_image
from .inspection import checked_classes, class_scores, inspecting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def class_images(
    model: torch.nn.Module,
    classes: Tensor,
    image_shape: tuple[int, int, int],
    *,
    steps: int = 200,
    step_size: float = 0.1,
    decay: float = 0.02,
    blur_width: float = 0.4,
    blur_every: int = 4,
    norm_percentile: float = 0.0,
    contribution_percentile: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Images that maximise the logits of classes, from a grey one.

    A step adds ``step_size`` times the gradient, scaled to a mean square of one, and then regularises.

    Args:
        classes: int64 ``[N]``.
        image_shape: ``(C, H, W)``.
        steps: of the ascent.
        step_size: change of a typical pixel in a step.
        decay: share that each pixel loses in a step: the step of an L2 penalty.
        blur_width: standard deviation, in pixels, of the Gaussian blur against high frequencies; none if zero.
        blur_every: steps from one blur to the next.
        norm_percentile: of the pixels' norms over the channels; those below become zero at the end of a step.
        contribution_percentile: likewise of the magnitude of pixel times gradient, summed over the channels.

    Returns:
        The images ``[N, C, H, W]``, and the probabilities of their classes ``[N]``.

    Raises:
        ValueError: a class that the network has not, or a regulariser outside its range.
    """
    for name, value, holds in (
        ("steps", steps, steps >= 1),
        ("step_size", step_size, step_size > 0),
        ("decay", decay, 0 <= decay < 1),
        ("blur_width", blur_width, blur_width >= 0),
        ("blur_every", blur_every, blur_every >= 1),
        ("norm_percentile", norm_percentile, 0 <= norm_percentile < 100),
        ("contribution_percentile", contribution_percentile, 0 <= contribution_percentile < 100),
    ):
        if not holds:
            raise ValueError(f"{name} is out of range: {value}")
    like = next(model.parameters(), torch.empty(0))
    images = like.new_zeros(len(classes), *image_shape)
    with inspecting(model, gradients=True):
        checked_classes(classes, images, class_scores(model, images[:1]).shape[1])
        for step in range(1, steps + 1):
            images = images.detach().requires_grad_()
            score = class_scores(model, images).gather(1, classes[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, images)
            with torch.no_grad():
                size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
                images = (images + step_size * gradient / size.clamp(min=1e-30)) * (1 - decay)
                if blur_width > 0 and step % blur_every == 0:
                    images = blurred(images, blur_width)
                images = _clipped(images, images.square().sum(1, keepdim=True), norm_percentile)
                images = _clipped(images, (images * gradient).sum(1, keepdim=True).abs(), contribution_percentile)
        with torch.no_grad():
            probabilities = class_scores(model, images).softmax(1).gather(1, classes[:, None])[:, 0]
    return images, probabilities


def blurred(images: Tensor, width: float) -> Tensor:
    """Images ``[N, C, H, W]`` convolved with a Gaussian of standard deviation ``width``; the mean is kept inside."""
    reach = max(1, math.ceil(3 * width))
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (offsets / width) ** 2)
    weights = weights / weights.sum()
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        kernel = weights.view(shape)
        padding = [reach if size > 1 else 0 for size in reversed(kernel.shape[2:]) for _ in range(2)]
        rows = F.pad(images.flatten(0, 1).unsqueeze(1), padding, "replicate")
        images = F.conv2d(rows, kernel).squeeze(1).unflatten(0, images.shape[:2])
    return images


def _clipped(images: Tensor, sizes: Tensor, percentile: float) -> Tensor:
    """The images with zeros in the pixels that are among the ``percentile`` smallest by ``sizes`` ``[N, 1, H, W]``."""
    if percentile == 0:
        return images
    threshold = torch.quantile(sizes.flatten(1).float(), percentile / 100, dim=1).to(sizes).view(-1, 1, 1, 1)
    return images.masked_fill(sizes < threshold, 0)


def draw_class_images(images: Tensor, probabilities: Tensor, classes: Tensor) -> Figure:
    """The images, each with its class and the network's probability of it."""
    rows, columns = near_square(len(images))
    figure, axes = grid(rows, columns, "Images that maximise the score of a class", 1.3, 1.4)
    for axis, image, probability, label in zip(axes.flat, images, probabilities, classes, strict=False):
        show_image(axis, image, f"{int(label)} ({probability.item():.0%})")
    return figure
