"""Small networks of every kind that can be trained, and a program that trains them in a process of its own."""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import cli, data, nn
from dlkernels.data import DataSet
from dlkernels.models import registry
from dlkernels.train import Progress, Trainer


class TinyClassifier(torch.nn.Module):
    """Two linear layers; draws from every generator while training, and from torch's also in evaluation."""

    def __init__(
        self,
        in_features: int,
        num_classes: int = 10,
        hidden_features: int = 16,
        dropout: float = 0.0,
        noise: float = 0.0,
        norm: bool = False,
        label: str | None = None,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if hidden_features < 1:
            raise ValueError(f"hidden_features must be positive, got {hidden_features}")
        self.noise = noise
        self.hidden = layers.Linear(in_features, hidden_features)
        self.norm = layers.BatchNorm1d(hidden_features) if norm else torch.nn.Identity()
        self.dropout = torch.nn.Dropout(dropout)
        self.scores = layers.Linear(hidden_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.noise > 0:
            images = images + self.noise * torch.randn_like(images)
        logits = self.scores(self.dropout(torch.relu(self.norm(self.hidden(images.flatten(1))))))
        if self.noise > 0 and self.training:
            logits = logits * (1 + self.noise * random.random() + self.noise * np.random.rand())
        return logits


class TinyLanguageModel(torch.nn.Module):
    """A bigram model."""

    def __init__(self, vocabulary_size: int, max_length: int = 8, layers: ModuleType = nn) -> None:
        super().__init__()
        self.max_length = max_length
        self.embedding = torch.nn.Embedding(vocabulary_size, 16)
        self.scores = layers.Linear(16, vocabulary_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.embedding(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class TinyTranslator(torch.nn.Module):
    """The mean of the source and the last symbol of the target give the next."""

    def __init__(
        self, source_vocabulary_size: int, target_vocabulary_size: int, padding_index: int = 0, layers: ModuleType = nn
    ) -> None:
        super().__init__()
        self.padding_index = padding_index
        self.source = torch.nn.Embedding(source_vocabulary_size, 16)
        self.target = torch.nn.Embedding(target_vocabulary_size, 16)
        self.scores = layers.Linear(16, target_vocabulary_size)

    def forward(self, source: Tensor, target_inputs: Tensor) -> Tensor:
        return self.scores(self.source(source).mean(1, keepdim=True) + self.target(target_inputs))

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        logits = self(source, target[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=self.padding_index)


class TinyCaptioner(torch.nn.Module):
    """The mean colour and the last word give the next."""

    def __init__(
        self, vocabulary_size: int, padding_index: int, start_index: int, end_index: int, layers: ModuleType = nn
    ) -> None:
        super().__init__()
        assert (padding_index, start_index, end_index) == (0, 1, 2)
        self.image = layers.Linear(3, 16)
        self.word = torch.nn.Embedding(vocabulary_size, 16)
        self.scores = layers.Linear(16, vocabulary_size)

    def forward(self, images: Tensor, caption_inputs: Tensor) -> Tensor:
        return self.scores(torch.relu(self.image(images.mean((2, 3))).unsqueeze(1) + self.word(caption_inputs)))

    def loss(self, images: Tensor, captions: Tensor) -> Tensor:
        logits = self(images, captions[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=0)


class TinyAnswerer(torch.nn.Module):
    """The mean colour and the mean word give the answer."""

    def __init__(self, vocabulary_size: int, num_answers: int, layers: ModuleType = nn) -> None:
        super().__init__()
        self.image = layers.Linear(3, 16)
        self.word = torch.nn.Embedding(vocabulary_size, 16)
        self.scores = layers.Linear(16, num_answers)

    def forward(self, images: Tensor, questions: Tensor) -> Tensor:
        return self.scores(torch.relu(self.image(images.mean((2, 3))) + self.word(questions).mean(1)))

    def loss(self, images: Tensor, questions: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(self(images, questions), answers)


class TinyAutoencoder(torch.nn.Module):
    """A linear code."""

    def __init__(self, in_features: int, layers: ModuleType = nn) -> None:
        super().__init__()
        self.encoder = layers.Linear(in_features, 8)
        self.decoder = layers.Linear(8, in_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images.flatten(1))).view_as(images)

    def loss(self, images: Tensor) -> Tensor:
        return F.mse_loss(self(images), images)


class TinyEncoder(TinyAutoencoder):
    """Has an argument that nothing tells but who builds it."""

    def __init__(self, in_features: int, code_features: int, layers: ModuleType = nn) -> None:
        super().__init__(in_features, layers)


class TinyGAN(torch.nn.Module):
    """Linear players. Its noise can be turned off, so that its losses do not depend on who draws it."""

    def __init__(self, in_features: int, noise: float = 1.0, layers: ModuleType = nn) -> None:
        super().__init__()
        self.noise = noise
        self.generator = layers.Linear(4, in_features)
        self.discriminator = layers.Linear(in_features, 1)

    def _generated(self, n: int) -> Tensor:
        return self.generator(self.noise * torch.randn(n, 4, dtype=self.generator.weight.dtype))

    def generator_loss(self, n: int) -> Tensor:
        return F.softplus(-self.discriminator(self._generated(n))).mean()

    def discriminator_loss(self, images: Tensor) -> Tensor:
        real, fake = self.discriminator(images.flatten(1)), self.discriminator(self._generated(len(images)).detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean()


class TinyColourNet(torch.nn.Module):
    """Takes colour images of any size, as networks for photographs do; two more classifiers while training."""

    def __init__(self, num_classes: int = 1000, auxiliary: bool = False, layers: ModuleType = nn) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.conv = layers.Conv2d(3, 8, 3)
        self.scores = torch.nn.ModuleList(layers.Linear(8, num_classes) for _ in range(3))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = torch.relu(self.conv(images)).mean((2, 3))
        logits = tuple(scores(features) for scores in self.scores)
        return logits if self.training and self.auxiliary else logits[0]


def tiny_colour_net(hidden: int = 3, **arguments: object) -> TinyColourNet:
    """A builder that passes the rest on."""
    assert hidden == 3
    return TinyColourNet(**arguments)  # type: ignore[arg-type]


NETWORKS = (
    TinyClassifier,
    TinyLanguageModel,
    TinyTranslator,
    TinyCaptioner,
    TinyAnswerer,
    TinyAutoencoder,
    TinyEncoder,
    TinyGAN,
    tiny_colour_net,
)
BUILDERS = {network.__name__.lower(): network for network in NETWORKS}


load = data.load


@functools.cache
def load_once(*arguments: Any, **options: Any) -> DataSet:
    """A data set that several runs of the tests share."""
    return load(*arguments, **options)


def run_slowly(arguments: list[str]) -> int:
    """The command with these networks, a step in ten milliseconds or more: there is time to kill it in the middle."""
    registry._builders.update(BUILDERS)
    run = Trainer.run

    def slow_run(trainer: Trainer) -> Iterator[Progress]:
        for progress in run(trainer):
            time.sleep(0.01)
            yield progress

    Trainer.run = slow_run  # type: ignore[method-assign]
    return cli.run(arguments)


if __name__ == "__main__":
    sys.exit(run_slowly(sys.argv[1:]))
