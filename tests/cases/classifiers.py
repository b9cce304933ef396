"""A small member of each family of classifiers in dlkernels.models, for what must work on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch

from dlkernels import models
from dlkernels.models.densenet import DenseNet
from dlkernels.models.efficientnet import EfficientNet
from dlkernels.models.googlenet import GoogLeNet
from dlkernels.models.mnasnet import MNASNet
from dlkernels.models.mobilenet import MobileNetV1, MobileNetV2
from dlkernels.models.resnet import BasicBlock, Bottleneck, CifarResNet, PreActivationResNet, ResNet
from dlkernels.models.vgg import VGG

CLASSES = 5


def narrowed(builder: Callable[..., Any], layers: ModuleType) -> torch.nn.Module:
    """With one linear layer for the three whose 4096 features would take more time than everything else."""
    with torch.device("meta"):
        model = builder(layers=layers)
    linear = next(module for module in model.classifier if isinstance(module, torch.nn.Linear))
    model.classifier = torch.nn.Sequential(torch.nn.Dropout(), layers.Linear(linear.in_features, CLASSES))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


# What builds it on a library's layers, and the shape of its images.
CLASSIFIERS: dict[str, tuple[Callable[[ModuleType], torch.nn.Module], tuple[int, int, int]]] = {
    "linear": (lambda layers: models.LinearClassifier(64, CLASSES, layers=layers), (1, 8, 8)),
    "two_layer": (lambda layers: models.TwoLayerNet(64, 16, CLASSES, layers=layers), (1, 8, 8)),
    "mlp": (
        lambda layers: models.MLP(64, (16, 16), CLASSES, norm=layers.BatchNorm1d, dropout=0.5, layers=layers),
        (1, 8, 8),
    ),
    "convnet": (lambda layers: models.ThreeLayerConvNet(8, 1, CLASSES, 4, 3, 8, True, layers=layers), (1, 8, 8)),
    "lenet": (lambda layers: models.LeNet(8, 1, CLASSES, layers=layers), (1, 8, 8)),
    "lenet5": (lambda layers: models.LeNet5(28, 1, CLASSES, layers=layers), (1, 28, 28)),
    "alexnet": (lambda layers: narrowed(models.alexnet, layers), (3, 64, 64)),
    "vgg": (lambda layers: narrowed(partial(VGG, ((8,), (16, 16)), True), layers), (3, 16, 16)),
    "googlenet": (lambda layers: GoogLeNet(CLASSES, layers=layers), (3, 32, 32)),
    "resnet": (lambda layers: ResNet(BasicBlock, (1, 1, 1, 1), CLASSES, layers=layers), (3, 32, 32)),
    "resnext": (lambda layers: ResNet(Bottleneck, (1, 1, 1, 1), CLASSES, False, 8, 4, layers=layers), (3, 32, 32)),
    "cifar_resnet": (lambda layers: CifarResNet(8, CLASSES, layers=layers), (3, 16, 16)),
    "preact_resnet": (lambda layers: PreActivationResNet(False, (1, 1), CLASSES, layers=layers), (3, 32, 32)),
    "densenet": (lambda layers: DenseNet(8, (2, 2), 16, num_classes=CLASSES, layers=layers), (3, 32, 32)),
    "mobilenet_v1": (lambda layers: MobileNetV1(CLASSES, width_mult=0.25, layers=layers), (3, 32, 32)),
    "mobilenet_v2": (lambda layers: MobileNetV2(CLASSES, width_mult=0.25, layers=layers), (3, 32, 32)),
    "mnasnet": (lambda layers: MNASNet(0.25, CLASSES, layers=layers), (3, 32, 32)),
    "efficientnet": (lambda layers: EfficientNet(0.25, 0.5, num_classes=CLASSES, layers=layers), (3, 32, 32)),
    "vision_transformer": (
        lambda layers: models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=CLASSES, layers=layers),
        (3, 16, 16),
    ),
    "cells": (
        lambda layers: models.CellNetwork(channels=4, num_cells=3, num_classes=CLASSES, layers=layers),
        (3, 8, 8),
    ),
    "mlp_mixer": (lambda layers: models.MLPMixer(16, 4, 2, 16, 8, 32, CLASSES, layers=layers), (3, 16, 16)),
}
