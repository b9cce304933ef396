"""Convolutions of ResNet-18/50 (He et al. 2016), VGG-16, MobileNetV2, AlexNet and LeNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import functional
from .harness import Case, Cost, Problem


@dataclass(frozen=True)
class Shape:
    """A layer: images, channels in and out, height and width, kernel, stride, padding, groups."""

    name: str
    images: int
    in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1


BOTH_LAYOUTS = ("channels_last", "contiguous")

# Class, layouts, element types, shapes; the first shape of each is the one that a quick run measures.
GROUPS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[Shape, ...]], ...] = (
    (
        "3x3 stride 1",
        BOTH_LAYOUTS,
        ("float32", "bfloat16"),
        (
            Shape("ResNet-50 layer2", 4, 128, 128, 28, 3, 1, 1),
            Shape("ResNet-50 layer1", 4, 64, 64, 56, 3, 1, 1),
            Shape("ResNet-50 layer4", 4, 512, 512, 7, 3, 1, 1),
            Shape("VGG-16 conv2_1", 1, 64, 128, 112, 3, 1, 1),
            Shape("ResNet-50 layer3, one image", 1, 256, 256, 14, 3, 1, 1),
        ),
    ),
    (
        "3x3 stride 2",
        ("channels_last",),
        ("float32",),
        (
            Shape("ResNet-50 layer2.0", 4, 128, 128, 56, 3, 2, 1),
            Shape("ResNet-50 layer3.0", 4, 256, 256, 28, 3, 2, 1),
            Shape("ResNet-18 layer4.0", 4, 256, 512, 14, 3, 2, 1),
        ),
    ),
    (
        "1x1",
        BOTH_LAYOUTS,
        ("float32",),
        (
            Shape("ResNet-50 layer3 reduce", 4, 1024, 256, 14, 1),
            Shape("ResNet-50 layer1 expand", 4, 64, 256, 56, 1),
            Shape("ResNet-50 layer4 expand", 4, 512, 2048, 7, 1),
            Shape("MobileNetV2 expand", 4, 24, 144, 56, 1),
        ),
    ),
    (
        "stem, images without gradient",
        ("contiguous",),
        ("float32",),
        (
            Shape("LeNet conv1, 5x5", 32, 1, 6, 28, 5, 1, 2),
            Shape("ResNet-50 conv1, 7x7", 4, 3, 64, 224, 7, 2, 3),
            Shape("AlexNet conv1, 11x11", 4, 3, 64, 224, 11, 4, 2),
            Shape("ViT-B/16 patches", 4, 3, 768, 224, 16, 16),
        ),
    ),
    (
        "depthwise",
        BOTH_LAYOUTS,
        ("float32",),
        (
            Shape("MobileNetV2 block 4", 4, 192, 192, 28, 3, 1, 1, 192),
            Shape("MobileNetV2 block 1", 4, 96, 96, 112, 3, 2, 1, 96),
            Shape("MobileNetV2 block 14", 4, 960, 960, 7, 3, 1, 1, 960),
        ),
    ),
)


# A GPU has room for the batches that networks are trained with.
GPU_GROUPS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], tuple[Shape, ...]], ...] = (
    (
        "ResNet-50",
        ("channels_last",),
        ("float32", "bfloat16"),
        (
            Shape("layer3 3x3", 256, 256, 256, 14, 3, 1, 1),
            Shape("layer1 3x3", 256, 64, 64, 56, 3, 1, 1),
            Shape("layer2 3x3", 256, 128, 128, 28, 3, 1, 1),
            Shape("layer4 3x3", 256, 512, 512, 7, 3, 1, 1),
            Shape("layer1 expand", 256, 64, 256, 56, 1),
            Shape("layer2 reduce", 256, 512, 128, 28, 1),
            Shape("layer3 reduce", 256, 1024, 256, 14, 1),
            Shape("layer2 shortcut", 256, 256, 512, 56, 1, 2),
            Shape("layer3.0 3x3 stride 2", 256, 256, 256, 28, 3, 2, 1),
            Shape("layer3 3x3, 32 images", 32, 256, 256, 14, 3, 1, 1),
            Shape("layer4 3x3, 32 images", 32, 512, 512, 7, 3, 1, 1),
        ),
    ),
    (
        "VGG-16",
        ("channels_last",),
        ("float32", "bfloat16"),
        (Shape("conv3", 64, 256, 256, 56, 3, 1, 1), Shape("conv1_2", 64, 64, 64, 224, 3, 1, 1)),
    ),
    (
        "CIFAR ResNet",
        BOTH_LAYOUTS,
        ("float32", "bfloat16"),
        (Shape("64 channels", 256, 64, 64, 32, 3, 1, 1), Shape("16 channels", 256, 16, 16, 32, 3, 1, 1)),
    ),
    (
        "stem, images without gradient",
        BOTH_LAYOUTS,
        ("float32", "bfloat16"),
        (Shape("ResNet-50 conv1, 7x7", 256, 3, 64, 224, 7, 2, 3), Shape("ViT-B/16 patches", 256, 3, 768, 224, 16, 16)),
    ),
    (
        "depthwise",
        BOTH_LAYOUTS,
        ("float32", "bfloat16"),
        (
            Shape("MobileNetV2 block 4", 256, 192, 192, 28, 3, 1, 1, 192),
            Shape("MobileNetV2 block 1", 256, 96, 96, 112, 3, 2, 1, 96),
        ),
    ),
)


def cost(shape: Shape, element_size: int) -> tuple[Cost, Cost]:
    """Forward; forward with the gradients of input and weight, each as many products as the forward.

    Images are data: the first layer of a network has no input gradient.
    """
    out_size = (shape.size + 2 * shape.padding - shape.kernel) // shape.stride + 1
    taps = shape.in_channels // shape.groups * shape.kernel**2
    outputs = shape.images * shape.out_channels * out_size**2
    inputs = shape.images * shape.in_channels * shape.size**2
    tensors = element_size * (inputs + shape.out_channels * taps + outputs)
    operations = 2 * outputs * taps
    passes = 2 if shape.in_channels <= 3 else 3
    return Cost(tensors, operations), Cost(passes * tensors, passes * operations)


def problem(shape: Shape, layout: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random input, weight and bias."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    image = torch.randn(shape.images, shape.in_channels, shape.size, shape.size, generator=generator, device=device)
    taps = shape.in_channels // shape.groups
    weight = torch.randn(shape.out_channels, taps, shape.kernel, shape.kernel, generator=generator, device=device)
    weight /= (taps * shape.kernel**2) ** 0.5
    bias = torch.randn(shape.out_channels, generator=generator, device=device)
    image, weight = (tensor.to(dtype).to(memory_format=memory_format) for tensor in (image, weight))
    arguments = (shape.stride, shape.padding, 1, shape.groups)

    def ours(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.conv2d(image, weight, bias, *arguments)

    def peer(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(image, weight, bias, *arguments)

    inputs = (image.requires_grad_(shape.in_channels > 3), weight.requires_grad_(), bias.to(dtype).requires_grad_())
    return Problem(inputs, ours, peer)


def cases(dtypes: tuple[torch.dtype, ...], quick: bool = False, gpu: bool = False) -> Iterator[Case]:
    """Every shape in every layout and type of its class; only the first shape for a quick run."""
    for group, layouts, group_dtypes, shapes in GPU_GROUPS if gpu else GROUPS:
        for dtype in dtypes:
            if str(dtype).removeprefix("torch.") not in group_dtypes:
                continue
            for layout in layouts:
                for shape in shapes[:1] if quick else shapes:
                    forward, both = cost(shape, dtype.itemsize)
                    dims = f"{shape.images}x{shape.in_channels}x{shape.size}x{shape.size} to {shape.out_channels}"
                    yield Case(
                        "conv2d",
                        f"conv2d {group}, {layout}",
                        f"{shape.name} ({dims})",
                        dtype,
                        partial(problem, shape, layout, dtype),
                        forward,
                        both,
                    )
