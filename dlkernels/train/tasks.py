"""What networks are trained for: which data each kind takes, how it is built for it, its losses and its figures.

A network shows its kind by its losses. One without a method ``loss`` is a classifier: the loss is taken of its logits.
Of the others the names of the loss's parameters say what it is given: ``loss(tokens, targets)`` is a language model,
``loss(source, target)`` turns sequences into sequences, and so on; a GAN has a loss for each of its two players.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import data as datasets
from .. import nn
from ..data import Images
from ..data.sets import Columns
from .augment import CutMix, Cutout, Mixup
from .settings import Settings

Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Player:
    """A loss, and the weights that are moved to make it small."""

    name: str  # of the loss
    loss: Callable[..., Tensor]  # of a batch
    weights: torch.nn.Module


class Task:
    """What one kind of network is trained for.

    Attributes:
        title: what such a network is called in messages.
        kind: of data, as :func:`dlkernels.data.load` has it.
        source: what it is trained on unless something else is asked for.
        settings: how it is trained unless something else is asked for.
        has_validation_loss: whether a network with a smaller one is a better one.
        has_classes: whether ``label_smoothing``, ``mixup``, ``cutmix`` and ``cutout`` mean anything.

    Args:
        layers: where losses come from that are not the network's own, ``dlkernels.nn`` or ``torch.nn``.
    """

    title: str
    kind: str
    source: str
    settings: Settings
    has_validation_loss = True
    has_classes = False

    def __init__(self, layers: ModuleType = nn) -> None:
        self.layers = layers

    def arguments(self, data: Any) -> dict[str, object]:
        """Arguments of constructors that follow from the data. A network is given those that it has."""
        raise NotImplementedError

    def players(self, model: Any, data: Any, settings: Settings) -> list[Player]:
        """The losses to minimise, in turns where there are several. Each is a mean over :meth:`count` targets."""
        return [Player("loss", model.loss, model)]

    def inputs(self, batch: Columns) -> Columns:
        """What of a batch of the data the losses take."""
        return batch

    def count(self, part: Columns, rows: Tensor) -> int:
        """How many targets a loss of the examples ``rows`` is the mean over."""
        return len(rows)

    def figures(self, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        """Figures of a batch in evaluation, each a mean over :meth:`count` targets; ``loss`` is to become small."""
        return {"loss": model.loss(*batch)}

    def summary(self, figures: dict[str, float]) -> dict[str, float]:
        """Figures of a whole part, from their means over it."""
        return figures


def image_arguments(data: Images) -> dict[str, object]:
    """What follows from images."""
    size, channels = data.image_size, data.channels
    return {"image_size": size, "in_channels": channels, "in_features": channels * size**2}


class Classification(Task):
    """Images to classes: ``model(images) -> logits``."""

    title = "a classifier"
    kind = "images"
    source = "digits"
    settings = Settings(label_smoothing=0.1)
    has_classes = True

    def arguments(self, data: datasets.ClassifiedImages) -> dict[str, object]:
        return {**image_arguments(data), "num_classes": data.num_classes}

    def players(self, model: Any, data: datasets.ClassifiedImages, settings: Settings) -> list[Player]:
        cross_entropy = self.layers.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        augment = augmentation(settings, data.num_classes)

        def criterion(logits: Tensor, labels: Tensor) -> Tensor:
            if labels.dim() == 2:  # shares; a network may have more classes than the data, which then have none
                labels = torch.nn.functional.pad(labels, (0, max(0, logits.shape[1] - labels.shape[1])))
            return cross_entropy(logits, labels)

        def loss(images: Tensor, labels: Tensor) -> Tensor:
            images, labels = augment(images, labels)
            logits = model(images)  # [N, classes]
            if isinstance(logits, Tensor):
                return criterion(logits, labels)
            # GoogLeNet while training: two more classifiers half-way, which count 0.3 (Szegedy et al. 2015, section 5).
            main, *auxiliary = logits
            return criterion(main, labels) + 0.3 * sum(criterion(other, labels) for other in auxiliary)

        return [Player("loss", loss, model)]

    def figures(self, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        images, labels = batch
        logits = model(images)  # [N, classes]
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"accuracy": accuracy, "loss": self.layers.CrossEntropyLoss()(logits, labels)}


def augmentation(settings: Settings, num_classes: int) -> Augmentation:
    """What ``settings`` make of images and labels in training: holes first, then one of Mixup and CutMix.

    Where both are asked for, each call draws one of them. All draws come from torch's generators.
    """
    cutout = None if settings.cutout is None else Cutout(settings.cutout)
    mixes: list[Augmentation] = []
    if settings.mixup is not None:
        mixes.append(Mixup(num_classes, settings.mixup))
    if settings.cutmix is not None:
        mixes.append(CutMix(num_classes, settings.cutmix))

    def augment(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if cutout is not None:
            images, labels = cutout(images, labels)
        if mixes:
            chosen = int(torch.randint(len(mixes), ())) if len(mixes) > 1 else 0
            images, labels = mixes[chosen](images, labels)
        return images, labels

    return augment


class LanguageModelling(Task):
    """Tokens to the tokens that follow: ``model.loss(tokens, targets)``."""

    title = "a language model"
    kind = "text"
    source = "text"
    settings = Settings(
        epochs=5, optimizer="adamw", learning_rate=2e-3, weight_decay=0.01, schedule="cosine", clip_norm=1.0
    )

    def arguments(self, data: datasets.Text) -> dict[str, object]:
        return {"vocabulary_size": len(data.vocabulary), "max_length": data.train[0].shape[1] - 1}

    def summary(self, figures: dict[str, float]) -> dict[str, float]:
        return {**figures, "perplexity": perplexity(figures["loss"])}


class Translation(Task):
    """Sequences to sequences: ``model.loss(source, target)``, ``model(source, target_inputs) -> logits``."""

    title = "a sequence-to-sequence network"
    kind = "pairs"
    source = "synthetic"
    settings = Settings(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, clip_norm=1.0)

    def arguments(self, data: datasets.SequencePairs) -> dict[str, object]:
        size = len(data.vocabulary)
        return {"source_vocabulary_size": size, "target_vocabulary_size": size, **special_symbols()}

    def count(self, part: Columns, rows: Tensor) -> int:
        return count_predicted(part[1][rows])

    def figures(self, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        source, target = batch
        predicted = model(source, target[:, :-1]).argmax(-1)  # [N, T - 1], each from the right symbols before it
        counted = target[:, 1:] != datasets.PADDING
        accuracy = (predicted == target[:, 1:])[counted].float().mean()
        return {"accuracy": accuracy, "loss": model.loss(source, target)}


class Captioning(Task):
    """Images to sentences: ``model.loss(images, captions)``."""

    title = "a captioner"
    kind = "captions"
    source = "synthetic"
    settings = Translation.settings

    def arguments(self, data: datasets.CaptionedImages) -> dict[str, object]:
        return {**image_arguments(data), "vocabulary_size": len(data.vocabulary), **special_symbols()}

    def count(self, part: Columns, rows: Tensor) -> int:
        return count_predicted(part[1][rows])

    def summary(self, figures: dict[str, float]) -> dict[str, float]:
        return {**figures, "perplexity": perplexity(figures["loss"])}


class QuestionAnswering(Task):
    """Images and questions to answers: ``model.loss(images, questions, answers)``, ``model(images, questions)``."""

    title = "a network that answers questions"
    kind = "questions"
    source = "synthetic"
    settings = Translation.settings

    def arguments(self, data: datasets.QuestionedImages) -> dict[str, object]:
        sizes = {"vocabulary_size": len(data.vocabulary), "num_answers": len(data.answers)}
        return {**image_arguments(data), **sizes, **special_symbols()}

    def figures(self, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        images, questions, answers = batch
        accuracy = (model(images, questions).argmax(1) == answers).float().mean()
        return {"accuracy": accuracy, "loss": model.loss(images, questions, answers)}


class Autoencoding(Task):
    """Images to themselves: ``model.loss(images)``."""

    title = "an autoencoder"
    kind = "images"
    source = "digits"
    settings = Settings(optimizer="adam", learning_rate=2e-3, weight_decay=0.0)

    def arguments(self, data: datasets.ClassifiedImages) -> dict[str, object]:
        return image_arguments(data)

    def inputs(self, batch: Columns) -> Columns:
        return batch[:1]


class Adversarial(Task):
    """A discriminator that tells images from a generator's: ``discriminator_loss(images)``, ``generator_loss(n)``.

    Each makes the other's loss larger: neither is small because the images are good.
    """

    title = "a GAN"
    kind = "images"
    source = "digits"
    settings = Settings(optimizer="adam", learning_rate=2e-4, momentum=0.5, weight_decay=0.0, schedule="constant")
    has_validation_loss = False

    def arguments(self, data: datasets.ClassifiedImages) -> dict[str, object]:
        return image_arguments(data)

    def inputs(self, batch: Columns) -> Columns:
        return batch[:1]

    def players(self, model: Any, data: datasets.ClassifiedImages, settings: Settings) -> list[Player]:
        return [
            Player("discriminator", model.discriminator_loss, model.discriminator),
            Player("generator", lambda images: model.generator_loss(len(images)), model.generator),
        ]

    def figures(self, model: Any, *batch: Tensor) -> dict[str, Tensor]:
        (images,) = batch
        return {"discriminator": model.discriminator_loss(images), "generator": model.generator_loss(len(images))}


# By the parameters of ``loss``.
BY_LOSS: dict[tuple[str, ...], type[Task]] = {
    ("tokens", "targets"): LanguageModelling,
    ("source", "target"): Translation,
    ("images", "captions"): Captioning,
    ("images", "questions", "answers"): QuestionAnswering,
    ("images",): Autoencoding,
}


def task_of(network: type[torch.nn.Module]) -> type[Task]:
    """What networks of this class are trained for.

    Raises:
        ValueError: its ``loss`` has parameters that no kind of data gives.
    """
    if hasattr(network, "generator_loss") and hasattr(network, "discriminator_loss"):
        return Adversarial
    if not hasattr(network, "loss"):
        return Classification
    names = tuple(inspect.signature(network.loss).parameters)[1:]  # without self
    if names not in BY_LOSS:
        known = " or ".join(f"({', '.join(names)})" for names in BY_LOSS)
        raise ValueError(f"{network.__name__}.loss takes ({', '.join(names)}), expected {known}")
    return BY_LOSS[names]


def special_symbols() -> dict[str, object]:
    """What the numbers of every vocabulary begin with."""
    return {"padding_index": datasets.PADDING, "start_index": datasets.START, "end_index": datasets.END}


def count_predicted(target: Tensor) -> int:
    """The symbols of sequences ``[N, T]`` that are to be predicted: all but the first, and no padding."""
    return int((target[:, 1:] != datasets.PADDING).sum())


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy; infinite where it has no number."""
    return math.exp(loss) if loss < 700 else math.inf
