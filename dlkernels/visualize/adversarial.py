"""Adversarial images, and noise of the same size to compare them with.

The fast gradient sign method (Goodfellow et al. 2015) takes one step; the targeted attack (Szegedy et al. 2014) takes
small ones until the network sees the class it is to see (Kurakin et al. 2017), never leaving the stated bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .figures import grid, plot, show_image, show_map
from .inspection import checked_classes, checked_images, class_scores, inspecting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Range = tuple[float, float]


@dataclass(frozen=True)
class TargetedAttack:
    """Images that were changed until they were taken for another class."""

    images: Tensor  # [N, C, H, W]
    fooled: Tensor  # whether the network sees the target, bool [N]
    steps: Tensor  # that it took, int64 [N]


def _loss_gradient(model: torch.nn.Module, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the loss with respect to each image, up to its length, and the logits.

    The cross-entropy is log(1 + exp(m)) of the margin m by which the other classes are ahead. Its gradient is that of m
    times a positive number, which is zero in float32 where the network is sure.
    """
    images = images.detach().requires_grad_()
    scores = class_scores(model, images)
    own = checked_classes(classes, images, scores.shape[1])[:, None]
    margin = scores.scatter(1, own, -torch.inf).logsumexp(1) - scores.gather(1, own)[:, 0]
    return torch.autograd.grad(margin.sum(), images)[0], scores.detach()


def _inside(images: Tensor, pixel_range: Range | None) -> Tensor:
    return images if pixel_range is None else images.clamp(*pixel_range)


def _check_size(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def fgsm(
    model: torch.nn.Module, images: Tensor, classes: Tensor, epsilon: float, pixel_range: Range | None = None
) -> Tensor:
    """Moves each pixel by ``epsilon`` in the direction in which the loss grows.

    Args:
        images: ``[N, C, H, W]``.
        classes: their true classes, int64 ``[N]``.
        epsilon: change of a pixel.
        pixel_range: least and greatest value that a pixel may have.

    Returns:
        ``[N, C, H, W]``.

    Raises:
        ValueError: ``epsilon`` is negative, or a class is unknown.
    """
    images = checked_images(images)
    _check_size("epsilon", epsilon)
    with inspecting(model, gradients=True):
        gradient, _ = _loss_gradient(model, images, classes)
    return _inside(images + epsilon * gradient.sign(), pixel_range)


def random_noise(images: Tensor, epsilon: float, pixel_range: Range | None = None, seed: int = 0) -> Tensor:
    """Moves each pixel by ``epsilon`` up or down at random: as far as :func:`fgsm` does, in no direction.

    Raises:
        ValueError: ``epsilon`` is negative.
    """
    images = checked_images(images)
    _check_size("epsilon", epsilon)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, images.shape, generator=generator) * 2 - 1
    return _inside(images + epsilon * signs.to(images), pixel_range)


def targeted_attack(
    model: torch.nn.Module,
    images: Tensor,
    targets: Tensor,
    bound: float,
    step_size: float,
    steps: int = 100,
    pixel_range: Range | None = None,
) -> TargetedAttack:
    """Changes images until the network takes them for ``targets``.

    Args:
        images: ``[N, C, H, W]``.
        targets: what each is to be taken for, int64 ``[N]``.
        bound: the most that a pixel may change.
        step_size: the change of a pixel in a step.
        steps: after how many to give up.
        pixel_range: least and greatest value that a pixel may have.

    Raises:
        ValueError: ``bound`` or ``step_size`` is negative, or a target is unknown.
    """
    images = checked_images(images)
    _check_size("bound", bound)
    _check_size("step_size", step_size)
    attacked = _inside(images, pixel_range).clone()
    taken = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    with inspecting(model, gradients=True):
        for _ in range(steps):
            gradient, scores = _loss_gradient(model, attacked, targets)
            left = scores.argmax(1) != targets
            if not left.any():
                break
            moved = attacked - step_size * gradient.sign()
            moved = _inside(torch.clamp(moved, images - bound, images + bound), pixel_range)
            attacked = torch.where(left.view(-1, 1, 1, 1), moved, attacked)
            taken += left
        with torch.no_grad():
            fooled = class_scores(model, attacked).argmax(1) == targets
    return TargetedAttack(attacked, fooled, taken)


def accuracy_under_attack(
    model: torch.nn.Module,
    images: Tensor,
    classes: Tensor,
    epsilons: list[float],
    pixel_range: Range | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Share of the images that are still recognised after :func:`fgsm` and after :func:`random_noise` of each size.

    Returns:
        Two tensors ``[len(epsilons)]``.
    """

    def accuracy(changed: Tensor) -> float:
        with inspecting(model):
            return (class_scores(model, changed).argmax(1) == classes).double().mean().item()

    attacked = [accuracy(fgsm(model, images, classes, epsilon, pixel_range)) for epsilon in epsilons]
    noisy = [accuracy(random_noise(images, epsilon, pixel_range, seed)) for epsilon in epsilons]
    return torch.tensor(attacked), torch.tensor(noisy)


def draw_accuracy_under_attack(epsilons: list[float], attacked: Tensor, noisy: Tensor) -> Figure:
    """Both accuracies over the size of the change."""
    figure, axis = plot("Accuracy under attack", "change of each pixel", "accuracy")
    axis.plot(epsilons, noisy.tolist(), marker="o", label="random signs")
    axis.plot(epsilons, attacked.tolist(), marker="o", label="signs of the gradient (FGSM)")
    axis.set_ylim(-0.02, 1.02)
    axis.legend()
    return figure


def draw_attack(images: Tensor, attacked: Tensor, seen_before: Tensor, seen_after: Tensor) -> Figure:
    """Each image, what was added to it, and their sum, with the classes ``[N]`` that the network sees in both."""
    figure, axes = grid(3, len(images), "Adversarial images: before, change, after", 1.2, 1.3)
    both = torch.cat([images, attacked])
    limits = (both.min().item(), both.max().item())
    change = (attacked - images).mean(1)  # [N, H, W]
    largest = max(change.abs().max().item(), 1e-12)
    for column in range(len(images)):
        show_image(axes[0, column], images[column], f"seen as {int(seen_before[column])}", limits)
        drawn = show_map(axes[1, column], change[column], largest=largest)
        show_image(axes[2, column], attacked[column], f"seen as {int(seen_after[column])}", limits)
    bar = figure.colorbar(drawn, ax=axes[1, :].tolist(), shrink=0.9)
    bar.set_label("change", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
