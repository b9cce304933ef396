"""Guided backpropagation: saliency in which only positive gradients pass a rectifier (Springenberg et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .figures import draw_images_and_maps, magnitude
from .inspection import hooked
from .saliency import saliency

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# captum's GuidedBackprop has ReLU alone; most networks since 2018 have others.
RECTIFIERS = (
    torch.nn.CELU,
    torch.nn.ELU,
    torch.nn.GELU,
    torch.nn.Hardswish,
    torch.nn.LeakyReLU,
    torch.nn.Mish,
    torch.nn.PReLU,
    torch.nn.ReLU,
    torch.nn.ReLU6,
    torch.nn.SELU,
    torch.nn.SiLU,
    torch.nn.Softplus,
)


def guided_backprop(model: torch.nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The gradient of a class's logit, of which only the positive part passes each rectifier.

    So it shows the pixels that excite what speaks for the class, and none that silence what speaks against it.

    Args:
        images: ``[N, C, H, W]``.
        classes: the class of each whose score is differentiated, int64 ``[N]``.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: the network has no rectifier among its modules.
    """
    rectifiers = [module for module in model.modules() if isinstance(module, RECTIFIERS)]
    if not rectifiers:
        raise ValueError(f"model must have a rectifier (torch.nn.ReLU or its like), {type(model).__name__} has none")
    with hooked(rectifiers, _guide):
        return saliency(model, images, classes)


def _guide(rectifier: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Has the gradient that arrives at the output lose its negative part."""
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.clamp(min=0))


def draw_guided_backprop(images: Tensor, gradients: Tensor, classes: Tensor) -> Figure:
    """Images above what :func:`guided_backprop` returned for them, of each pixel the channel with the greatest
    magnitude."""
    captions = [f"class {int(label)}" for label in classes]
    title = "Guided backpropagation"
    return draw_images_and_maps(images, magnitude(gradients), title, "gradient (own scales)", captions, True)
