"""What every function here does with a network: it looks at it in evaluation mode and leaves it as it was found."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

BATCH_SIZE = 256  # images that are looked at together


@contextmanager
def inspecting(model: torch.nn.Module, gradients: bool = False) -> Iterator[None]:
    """Evaluation mode, and gradients only if they are asked for; at the end every module has the mode it had.

    Gradients are taken of images by ``torch.autograd.grad``, which leaves those of the parameters alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def hooked(modules: Sequence[torch.nn.Module], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    """Calls ``hook(module, inputs, output)`` after each call of the modules. Batch norms next to them run unfused."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_layer(model: torch.nn.Module, layer: str) -> torch.nn.Module:
    """The module called ``layer`` in ``model.named_modules()``.

    Raises:
        ValueError: there is none; the message names the closest.
    """
    modules = dict(model.named_modules())
    if layer not in modules:
        close = ", ".join(difflib.get_close_matches(layer, modules, n=3, cutoff=0.3))
        raise ValueError(f"layer must name a module of {type(model).__name__}, got {layer!r}; the closest: {close}")
    return modules[layer]


def layer_outputs(model: torch.nn.Module, layer: str, images: Tensor) -> Tensor:
    """What the layer returns for the images, in its last call. The model has to be in evaluation mode.

    Raises:
        ValueError: there is no such layer, the model did not call it, or it returns something else than a tensor.
    """
    outputs: list[object] = []
    with hooked([find_layer(model, layer)], lambda module, inputs, output: outputs.append(output)):
        model(images)
    if not outputs or not isinstance(outputs[-1], Tensor):
        found = "was not called" if not outputs else f"returned a {type(outputs[-1]).__name__}"
        raise ValueError(f"layer must return a tensor in evaluation mode, but {layer!r} {found}")
    return outputs[-1].detach()


def class_scores(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Logits ``[N, classes]``.

    Raises:
        ValueError: the model returns something else.
    """
    scores = model(images)
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != len(images):
        got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"model must return logits [{len(images)}, classes] for {len(images)} images, got {got}")
    return scores


def checked_images(images: Tensor) -> Tensor:
    """The images, apart from whatever they were computed by.

    Raises:
        ValueError: they are not ``[N, C, H, W]`` of a floating type, or there are none.
    """
    if images.dim() != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(f"images must be floating [N, C, H, W], N > 0, got {images.dtype} {list(images.shape)}")
    return images.detach()


def checked_classes(classes: Tensor, images: Tensor, num_classes: int | None = None) -> Tensor:
    """The classes ``[N]``, one for each image.

    Raises:
        ValueError: there are more or fewer, they are not int64, or one is not in ``[0, num_classes)``.
    """
    if classes.dtype != torch.int64 or classes.shape != images.shape[:1]:
        raise ValueError(f"classes must be int64 [{len(images)}], got {classes.dtype} {list(classes.shape)}")
    if num_classes is not None and not bool(((classes >= 0) & (classes < num_classes)).all()):
        raise ValueError(f"classes must be in [0, {num_classes}), got {classes.tolist()}")
    return classes
