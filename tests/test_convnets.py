"""Convolutional networks: the same as torchvision's, the same on our layers as on torch's, and they learn."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import models, nn, train
from dlkernels.fuse import Tracer
from dlkernels.models.densenet import DenseNet
from dlkernels.models.efficientnet import EfficientNet
from dlkernels.models.googlenet import GoogLeNet, GoogLeNetOutputs, Inception, InceptionAux
from dlkernels.models.mnasnet import MNASNet
from dlkernels.models.mobilenet import MobileNetV1, MobileNetV2
from dlkernels.models.resnet import BasicBlock, Bottleneck, CifarResNet, PreActivationResNet, ResNet
from dlkernels.models.vgg import VGG

from .cases.networks import compare_with_torch
from .cases.reference import import_torchvision

PARAMETERS = {
    "alexnet": 61_100_840,
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "efficientnet_b0": 5_288_548,
    "efficientnet_b1": 7_794_184,
    "efficientnet_b2": 9_109_994,
    "efficientnet_b3": 12_233_232,
    "efficientnet_b4": 19_341_616,
    "efficientnet_b5": 30_389_784,
    "efficientnet_b6": 43_040_704,
    "efficientnet_b7": 66_347_960,
    "googlenet": 13_004_888,
    "mnasnet0_5": 2_218_512,
    "mnasnet0_75": 3_170_208,
    "mnasnet1_0": 4_383_312,
    "mnasnet1_3": 6_282_256,
    "mobilenet_v2": 3_504_872,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
PARAMETERS_OF_OTHERS = {
    "mobilenet_v1": 4_231_976,
    "preact_resnet18": 11_687_720,  # resnet18's, but for the norms
    "preact_resnet50": 25_549_352,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


def images(size: int, dtype: torch.dtype = torch.float32, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def in_training(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The outputs, with the same dropout each time. Moves the statistics of the norms."""
    torch.manual_seed(1)
    outputs = model.train()(x)
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def narrowed(model: torch.nn.Module, layers: ModuleType) -> torch.nn.Module:
    """With 32 hidden features in the classifier, whose 4096 would take more time than all other tests together."""
    classifier: Any = model.classifier
    positions = [index for index, module in enumerate(classifier) if isinstance(module, torch.nn.Linear)]
    for index, in_features, out_features in zip(
        positions, (classifier[positions[0]].in_features, 32, 32), (32, 32, 5), strict=True
    ):
        classifier[index] = layers.Linear(in_features, out_features)
    return model


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "expected"), [*PARAMETERS.items(), *PARAMETERS_OF_OTHERS.items()])
def test_number_of_parameters(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert count_parameters(models.get_model(name)) == expected


def test_googlenet_without_auxiliary_heads_has_half_the_parameters() -> None:
    with torch.device("meta"):
        assert count_parameters(models.googlenet(aux_logits=False)) == 6_624_904


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
@pytest.mark.parametrize("name", PARAMETERS)
def test_names_and_shapes_of_the_state_are_torchvisions(name: str) -> None:
    torchvision = import_torchvision()
    with torch.device("meta"):
        ours, theirs = models.get_model(name), torchvision.models.get_model(name)
    shapes, expected = ([(key, value.shape) for key, value in model.state_dict().items()] for model in (ours, theirs))
    assert shapes == expected


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("alexnet", {}, 63),
        ("densenet121", {"drop_rate": 0.1}, 64),
        ("efficientnet_b0", {}, 64),
        ("efficientnet_b5", {}, 64),
        ("googlenet", {"init_weights": True, "transform_input": True}, 48),
        ("mnasnet0_5", {}, 64),
        ("mobilenet_v2", {"width_mult": 0.75, "round_nearest": 4}, 64),
        ("mobilenet_v2", {"inverted_residual_setting": [[1, 16, 1, 1], [4, 24, 2, 2]]}, 32),
        ("resnet18", {"zero_init_residual": True}, 64),
        ("resnet18", {"norm_layer": partial(torch.nn.GroupNorm, 4)}, 64),
        ("resnext50_32x4d", {"replace_stride_with_dilation": [False, True, True]}, 64),
        ("vgg11_bn", {}, 64),
    ],
)
def test_initial_values_and_outputs_are_torchvisions(name: str, arguments: dict[str, Any], size: int) -> None:
    torchvision = import_torchvision()
    torch.manual_seed(0)
    ours = models.get_model(name, num_classes=10, **arguments)
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(name, num_classes=10, **arguments)
    for (key, value), (other, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == other and torch.equal(value, expected), f"initial values of {key} differ"

    if name in ("alexnet", "vgg11_bn"):
        ours, theirs = narrowed(ours, nn), narrowed(theirs, torch.nn)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images(size)
    with torch.no_grad():
        outputs, expected_outputs = (in_training(model.double(), x.double()) for model in (ours, theirs))
        for output, expected in zip(outputs, expected_outputs, strict=True):
            assert_close(output, expected, 1e-9)
        assert_close(ours.float().eval()(x), theirs.float().eval()(x), 1e-4)


@dataclasses.dataclass(frozen=True)
class Small:
    """A member of a family with few layers or channels, and images that leave its norms many values a channel."""

    build: Callable[[ModuleType], torch.nn.Module]
    size: int
    count: int = 4


SMALL = {
    "alexnet": Small(lambda layers: narrowed(models.alexnet(layers=layers), layers), 63, 2),
    "vgg": Small(lambda layers: narrowed(VGG(((16,), (32,), (32, 32)), layers=layers), layers), 16),
    "vgg_bn": Small(lambda layers: narrowed(VGG(((16,), (32,), (32, 32)), True, layers=layers), layers), 16),
    "inception": Small(
        lambda layers: torch.nn.Sequential(
            Inception(3, 8, 4, 8, 2, 4, 4, layers=layers), InceptionAux(24, 5, dropout=0.5, layers=layers)
        ),
        16,
    ),
    "resnet": Small(lambda layers: ResNet(BasicBlock, (1, 1, 1, 1), 5, layers=layers), 40, 3),
    "resnext": Small(lambda layers: ResNet(Bottleneck, (1, 1, 2, 1), 5, False, 8, 4, layers=layers), 40, 3),
    "cifar_resnet": Small(lambda layers: CifarResNet(14, layers=layers), 16),
    "preact_resnet": Small(lambda layers: PreActivationResNet(False, (1, 1, 1), 5, layers=layers), 32),
    "preact_resnet_bottleneck": Small(lambda layers: PreActivationResNet(True, (1, 1), 5, layers=layers), 32),
    "densenet": Small(lambda layers: DenseNet(8, (2, 2, 2), 16, drop_rate=0.1, num_classes=5, layers=layers), 64),
    "mobilenet_v1": Small(lambda layers: MobileNetV1(5, width_mult=0.25, layers=layers), 64),
    "mobilenet_v2": Small(lambda layers: MobileNetV2(5, width_mult=0.25, layers=layers), 64),
    "mnasnet": Small(lambda layers: MNASNet(0.25, 5, layers=layers), 64),
    "efficientnet": Small(lambda layers: EfficientNet(0.25, 0.5, num_classes=5, layers=layers), 64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SMALL)
def test_our_layers_and_torchs_agree(name: str, dtype: torch.dtype) -> None:
    small = SMALL[name]
    attempts = 4 if dtype == torch.float32 else 1
    for seed in range(attempts):
        x = images(small.size, dtype, small.count, seed)
        try:
            return compare_with_torch(small.build, lambda model, x=x: model(x), dtype)
        except AssertionError:
            # The gradients of ReLU and of a maximum jump. Where float32 rounds to two sides of a jump, they differ and
            # both are right; other images decide.
            if seed == attempts - 1:
                raise
    return None


def test_googlenet_on_our_layers_and_on_torchs_agrees() -> None:
    x = images(48, torch.float64)
    compare_with_torch(
        lambda layers: GoogLeNet(5, transform_input=True, layers=layers), lambda model: model(x), torch.float64
    )


def test_googlenet_has_auxiliary_logits_in_training_alone() -> None:
    model = models.googlenet(num_classes=5, init_weights=False)
    outputs = model(images(32))
    assert isinstance(outputs, GoogLeNetOutputs)
    assert [logits.shape for logits in outputs] == 3 * [(2, 5)]
    assert model.eval()(images(32)).shape == (2, 5)


def test_a_memory_efficient_densenet_computes_the_same() -> None:
    x = images(32, torch.float64)
    gradients = []
    for memory_efficient in (False, True):
        torch.manual_seed(0)
        model = DenseNet(8, (2, 2), 16, num_classes=5, memory_efficient=memory_efficient).double()
        gradients.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", [*SMALL, "googlenet"])
def test_every_activation_is_a_module_called_once_and_not_in_place(name: str) -> None:
    with torch.device("meta"):
        model = models.googlenet() if name == "googlenet" else SMALL[name].build(nn)
    graph = Tracer().trace(model.eval())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    assert set(calls.values()) == {1}
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    functions = {getattr(node.target, "__name__", node.target) for node in graph.nodes if node.op.startswith("call_")}
    assert not functions & {"relu", "relu_", "relu6", "silu", "sigmoid", "add_", "mul_"}


@pytest.mark.parametrize(("layers", "tracer"), [(nn, Tracer), (torch.nn, torch.fx.Tracer)], ids=["dlkernels", "torch"])
@pytest.mark.parametrize("name", SMALL)
def test_networks_can_be_traced(name: str, layers: ModuleType, tracer: type[torch.fx.Tracer]) -> None:
    small = SMALL[name]
    model = small.build(layers).eval()
    traced = torch.fx.GraphModule(model, tracer().trace(model))
    x = images(small.size)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)


def test_a_small_resnet_learns_the_digits(threads: None) -> None:
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    trainer = train.prepare(train.recipe("resnet20", settings={"epochs": 5}))
    for _ in trainer.run():
        pass
    assert trainer.finish()["accuracy"] >= 0.97


def test_running_statistics_of_mnasnet_move_as_fast_as_asked_for() -> None:
    for model, momentum in ((MNASNet(0.25, 5), 0.0003), (MNASNet(0.25, 5, momentum=0.1), 0.1)):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert [norm.momentum for norm in norms] == pytest.approx([momentum] * len(norms))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(18), "depth must be 2 more than a positive multiple of 6, got 18"),
        (lambda: CifarResNet(2), "depth must be 2 more than a positive multiple of 6, got 2"),
        (lambda: ResNet(BasicBlock, (1, 1, 1)), r"blocks must have 4 elements, got \(1, 1, 1\)"),
        (
            lambda: models.resnet50(replace_stride_with_dilation=[True]),
            r"replace_stride_with_dilation must have 3 elements, got \[True\]",
        ),
        (lambda: models.resnet18(groups=2), "basic blocks have groups=1, .* got groups=2"),
        (lambda: models.mobilenet_v1(width_mult=0), "width_mult must be positive, got 0"),
        (lambda: models.mobilenet_v2(width_mult=-1), "width_mult must be positive, got -1"),
        (
            lambda: models.mobilenet_v2(inverted_residual_setting=[[1, 2, 3]]),
            r"inverted_residual_setting must have 4 numbers a stage, got \[\[1, 2, 3\]\]",
        ),
        (lambda: MNASNet(0), "alpha must be positive, got 0"),
        (lambda: EfficientNet(0, 1), "width_mult and depth_mult must be positive, got 0 and 1"),
    ],
)
def test_arguments_that_make_no_network_are_refused(build: Callable[[], torch.nn.Module], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build()
