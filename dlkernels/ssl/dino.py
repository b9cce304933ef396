"""DINO: a student learns to say of small crops what a teacher, its own moving average, says of large ones (Caron et al.
2021, *Emerging properties in self-supervised vision transformers*).

There are no negatives. Two things keep all outputs from becoming one: the teacher's logits are centred, by a moving
average of their mean, so that no output dominates; and sharpened, by a low temperature, so that not all are equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import functional as F
from .. import nn
from . import distributed
from .augment import Augmentation
from .contrastive import check_temperature
from .momentum import check_momentum, follow, follower


class DINOHead(torch.nn.Module):
    """Three linear layers with GELU to a bottleneck of length 1, whose cosines with ``out_features`` learnt directions
    are the logits: ``[N, features]`` to ``[N, out_features]``.

    Args:
        features: how many features the encoder gives.
        out_features: how many logits.
        hidden_features: size of the hidden layers.
        bottleneck_features: size of the bottleneck.
    """

    def __init__(
        self,
        features: int,
        out_features: int = 65536,
        hidden_features: int = 2048,
        bottleneck_features: int = 256,
    ) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(
            nn.Linear(features, hidden_features),
            torch.nn.GELU(),
            nn.Linear(hidden_features, hidden_features),
            torch.nn.GELU(),
            nn.Linear(hidden_features, bottleneck_features),
        )
        self.directions = torch.nn.Parameter(torch.empty(out_features, bottleneck_features))
        for module in self.mlp:
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.trunc_normal_(module.weight, std=0.02)
                torch.nn.init.zeros_(module.bias)
        torch.nn.init.normal_(self.directions)

    def bottleneck(self, x: Tensor) -> Tensor:
        """``[N, features]`` to ``[N, bottleneck_features]`` of length 1."""
        return normalize(self.mlp(x), dim=1)

    def weight(self) -> Tensor:
        """The directions, ``[out_features, bottleneck_features]``, of length 1 (weight normalisation without a scale;
        Salimans & Kingma 2016)."""
        return normalize(self.directions, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.bottleneck(x), self.weight())


class DINO(torch.nn.Module):
    """Self-distillation without labels, over crops of several sizes.

    The teacher sees two global views, the student these and the local ones; each of the student's views is to predict
    what the teacher says of every other global view.

    Args:
        encoder: any module from images of either size to ``[N, features]``.
        head: from these to logits.
        global_view: makes random views of images that show most of them (:func:`.augment.random_view`).
        local_view: the same for views that show less; not needed without ``local_views``.
        local_views: how many.
        steps: how many optimiser's steps training has, over which the teacher's momentum rises to 1.
        momentum: of the teacher at first.
        student_temperature, teacher_temperature: divide the logits; the teacher's is lower, which sharpens.
        center_momentum: of the moving average of the teacher's mean logits.

    Attributes:
        encoder, head: the student.
        teacher_encoder, teacher_head: the teacher, whose features are the better ones.
        center: the moving average ``[out_features]``.
        step: how many updates there have been.

    Raises:
        ValueError: a momentum is outside [0, 1], a temperature or ``steps`` not positive, or local views are wanted
            without ``local_view``.
    """

    center: Tensor
    step: Tensor

    def __init__(
        self,
        encoder: torch.nn.Module,
        head: DINOHead,
        global_view: Augmentation,
        local_view: Augmentation | None = None,
        local_views: int = 0,
        steps: int = 100_000,
        momentum: float = 0.996,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        for value in (momentum, center_momentum):
            check_momentum(value)
        for value in (student_temperature, teacher_temperature):
            check_temperature(value)
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        if local_views > 0 and local_view is None:
            raise ValueError(f"local_view must be given to make {local_views} local views")
        self.encoder, self.head = encoder, head
        self.teacher_encoder, self.teacher_head = follower(encoder), follower(head)
        self.global_view, self.local_view, self.local_views = global_view, local_view, local_views
        self.steps, self.momentum, self.center_momentum = steps, momentum, center_momentum
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.register_buffer("center", torch.zeros(head.directions.shape[0]))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._means: list[Tensor] = []  # of the teacher's logits since the last update

    def forward(self, images: Tensor) -> Tensor:
        """The teacher's features ``[N, features]`` of images."""
        return self.teacher_encoder(images)

    def loss(self, images: Tensor) -> Tensor:
        """Mean cross-entropy over all pairs of a global view and another one; log(out_features) where all are equal.

        The student's logits are never in memory.
        """
        views = [self.global_view(images), self.global_view(images)]
        targets = self.targets(*views)
        both = (targets[0] + targets[1]) / 2
        # The cross-entropy is linear in its target: that with both targets in turn is twice that with their mean.
        losses = [self.student_loss(views[0], targets[1]), self.student_loss(views[1], targets[0])]
        for _ in range(self.local_views):
            losses.append(2 * self.student_loss(self.local_view(images), both))  # type: ignore[misc]
        return torch.stack(losses).sum() / (2 + 2 * self.local_views)

    @torch.no_grad()
    def targets(self, *views: Tensor) -> list[Tensor]:
        """What the teacher says of views, ``[N, out_features]`` each, without gradient: its logits centred, sharpened
        and made probabilities. While training, their mean waits for :meth:`update` to move the centre."""
        logits = [self.teacher_head(self.teacher_encoder(view)) for view in views]
        if self.training:
            self._means.append(torch.stack([x.mean(0) for x in logits]).mean(0))
        return [torch.softmax((x - self.center) / self.teacher_temperature, 1) for x in logits]

    def student_loss(self, view: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the student's answer to a view and the teacher's, ``target``."""
        bottleneck = self.head.bottleneck(self.encoder(view)) / self.student_temperature
        return F.linear_cross_entropy(bottleneck, self.head.weight(), target)

    @torch.no_grad()
    def update(self) -> None:
        """To be called after each step of the optimiser: the teacher follows the student, with a momentum that rises
        to 1 on half a cosine, and the centre follows the mean of the teacher's last logits."""
        progress = min(int(self.step) / self.steps, 1.0)
        momentum = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        follow(self.teacher_encoder, self.encoder, momentum)
        follow(self.teacher_head, self.head, momentum)
        if self._means:
            mean = distributed.mean(torch.stack(self._means).mean(0))
            self.center.lerp_(mean, 1 - self.center_momentum)
            self._means.clear()
        self.step += 1
