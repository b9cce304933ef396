"""Fully connected networks: one hidden layer (Rosenblatt 1962; Rumelhart et al. 1986), and any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .registry import register


@register
class TwoLayerNet(torch.nn.Module):
    """Linear, ReLU, linear: images ``[N, ...]`` of ``in_features`` pixels in all to logits ``[N, num_classes]``.

    Args:
        in_features: pixels of an image times its channels; 3072 for CIFAR-10, 784 for MNIST.
        hidden_features: size of the hidden layer.
        num_classes: classes to tell apart.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.
    """

    def __init__(
        self,
        in_features: int = 3072,
        hidden_features: int = 100,
        num_classes: int = 10,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.hidden = layers.Linear(in_features, hidden_features)
        self.activation = torch.nn.ReLU()
        self.scores = layers.Linear(hidden_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.hidden(x.flatten(1)))  # [N, hidden_features]
        return self.scores(x)  # [N, num_classes]


@register
class MLP(torch.nn.Module):
    """Any number of hidden layers, each linear, norm, activation and dropout, then a linear one.

    Images ``[N, ...]`` of ``in_features`` pixels in all to logits ``[N, num_classes]``.

    Args:
        in_features: pixels of an image times its channels; 3072 for CIFAR-10, 784 for MNIST.
        hidden_features: sizes of the hidden layers.
        num_classes: classes to tell apart.
        activation: makes the activation of each hidden layer.
        norm: makes the normalisation before each activation, ``dlkernels.nn.BatchNorm1d`` or ``torch.nn.LayerNorm``;
            none if not given.
        dropout: probability of zeroing an activation while training.
        drop_connect: probability of leaving out a weight of a hidden layer while training.
        layers: where the linear layers come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``dropout`` or ``drop_connect`` is outside [0, 1], or ``layers`` has none of the
            ``DropConnectLinear`` that the latter needs, as ``torch.nn``.
    """

    def __init__(
        self,
        in_features: int = 3072,
        hidden_features: Sequence[int] = (100, 100),
        num_classes: int = 10,
        activation: Callable[[], torch.nn.Module] = torch.nn.ReLU,
        norm: Callable[[int], torch.nn.Module] | None = None,
        dropout: float = 0.0,
        drop_connect: float = 0.0,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if drop_connect != 0 and not hasattr(layers, "DropConnectLinear"):
            raise ValueError(f"drop_connect must be 0 on layers of {layers.__name__}, got {drop_connect}")
        sizes = (in_features, *hidden_features)
        modules: list[torch.nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            linear = layers.Linear if drop_connect == 0 else partial(layers.DropConnectLinear, p=drop_connect)
            modules.append(linear(inputs, outputs))
            if norm is not None:
                modules.append(norm(outputs))
            modules += [activation(), torch.nn.Dropout(dropout)]
        self.hidden = layers.Sequential(*modules)
        self.scores = layers.Linear(sizes[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x.flatten(1))  # [N, hidden_features[-1]]
        return self.scores(x)  # [N, num_classes]
