"""Random views of images for contrastive learning, through kornia."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Augmentation = Callable[[Tensor], Tensor]  # images [N, C, H, W] to random views of them


def random_view(
    image_size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    strength: float = 1.0,
    flip: float = 0.5,
    blur: float = 0.5,
) -> torch.nn.Module:
    """The augmentation of SimCLR (Chen et al. 2020, appendix A): images ``[N, C, H, W]`` to views of them, each drawn
    by itself.

    MoCo v2 has scales from 0.2 and half the strength; DINO's global views have scales from 0.4, its local ones to 0.4.

    Args:
        image_size: height and width of the views.
        scale: which shares of the image's area are cropped.
        strength: of the colour jitter, which needs RGB images between 0 and 1; 0.0 leaves colours as they are.
        flip: probability of a horizontal flip.
        blur: probability of a Gaussian blur.

    Raises:
        ModuleNotFoundError: kornia is not installed.
    """
    from kornia import augmentation

    transforms: list[torch.nn.Module] = [augmentation.RandomResizedCrop((image_size, image_size), scale)]
    if flip > 0:
        transforms.append(augmentation.RandomHorizontalFlip(p=flip))
    if strength > 0:
        jitter = 0.8 * strength
        transforms += [
            augmentation.ColorJitter(jitter, jitter, jitter, 0.2 * strength, p=0.8),
            augmentation.RandomGrayscale(p=0.2),
        ]
    if blur > 0:
        kernel_size = max(3, image_size // 10 | 1)  # a tenth of the image, odd
        transforms.append(augmentation.RandomGaussianBlur((kernel_size, kernel_size), (0.1, 2.0), p=blur))
    return torch.nn.Sequential(*transforms)
