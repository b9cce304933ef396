"""Batch norm folded into the layer before it: the same outputs with fewer norms, and what others need stays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

import dlkernels
from dlkernels import models, nn
from dlkernels.models.densenet import DenseNet
from dlkernels.models.efficientnet import EfficientNet
from dlkernels.models.mnasnet import MNASNet
from dlkernels.models.mobilenet import MobileNetV1, MobileNetV2
from dlkernels.models.resnet import BasicBlock, Bottleneck, CifarResNet, PreActivationResNet, ResNet
from dlkernels.models.vgg import VGG

BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, with norms that do something."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    torch.nn.init.normal_(tensor, std=0.1)
    return model.eval()


def count_norms(model: torch.nn.Module) -> int:
    return sum(isinstance(module, BATCH_NORMS) for module in model.modules())


def assert_fused(model: torch.nn.Module, x: Tensor, norms_left: int, tolerance: float = 1e-12) -> None:
    with torch.no_grad():
        expected = model(x)
        assert dlkernels.fuse(model) is model
        assert count_norms(model) == norms_left
        torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# Each with the number of norms that follow no layer: at the start of blocks and the end of the network.
NETWORKS: dict[str, tuple[Callable[[ModuleType], torch.nn.Module], int]] = {
    "vgg_bn": (lambda layers: VGG(((8,), (8, 16)), batch_norm=True, num_classes=5, layers=layers), 0),
    "googlenet": (lambda layers: models.googlenet(init_weights=False, aux_logits=False, layers=layers), 0),
    "resnet": (lambda layers: ResNet(BasicBlock, (2, 1, 1, 1), 5, layers=layers), 0),
    "resnext": (lambda layers: ResNet(Bottleneck, (1, 2, 1, 1), 5, groups=2, layers=layers), 0),
    "cifar_resnet": (lambda layers: CifarResNet(14, layers=layers), 0),
    "preact_resnet": (
        lambda layers: PreActivationResNet(True, (2, 1), 5, layers=layers),
        3,
    ),
    "densenet": (
        lambda layers: DenseNet(8, (2, 3), 16, num_classes=5, layers=layers),
        7,
    ),
    "mobilenet_v1": (lambda layers: MobileNetV1(5, layers=layers), 0),
    "mobilenet_v2": (lambda layers: MobileNetV2(5, layers=layers), 0),
    "mnasnet": (lambda layers: MNASNet(0.5, 5, layers=layers), 0),
    "efficientnet": (lambda layers: EfficientNet(0.5, 1.0, num_classes=5, layers=layers), 0),
}


@pytest.mark.parametrize("layers", [nn, torch.nn], ids=["dlkernels", "torch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_the_same(name: str, layers: ModuleType) -> None:
    build, norms_left = NETWORKS[name]
    model = filled(build(layers))
    x = torch.randn(2, 3, 32, 32)
    single, double = model, filled(build(layers)).double()
    assert_fused(single, x, norms_left, 1e-5)
    assert_fused(double, x.double(), norms_left)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear, nn.BatchNorm1d, (6, 3)),
        (torch.nn.Linear, torch.nn.BatchNorm1d, (6, 3)),
        (torch.nn.Conv1d, torch.nn.BatchNorm1d, (2, 3, 9)),
        (nn.Conv2d, torch.nn.BatchNorm2d, (2, 3, 5, 5)),
        (torch.nn.Conv2d, nn.BatchNorm2d, (2, 3, 5, 5)),
        (torch.nn.Conv3d, torch.nn.BatchNorm3d, (2, 3, 3, 4, 5)),
    ],
)
def test_every_kind_of_layer_is_folded_into(
    layer: type[torch.nn.Module], norm: type[torch.nn.Module], shape: tuple[int, ...], bias: bool, affine: bool
) -> None:
    kernel = () if issubclass(layer, torch.nn.Linear) else (3,)
    model = torch.nn.Sequential(layer(3, 8, *kernel, bias=bias), norm(8, affine=affine))
    assert_fused(filled(model).double(), torch.randn(shape, dtype=torch.float64), 0)


class Pair(torch.nn.Module):
    """A convolution, a norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return nn.norm_activation(self.norm, self.relu, self.conv(x))


class AnotherReader(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class OwnResidual(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return nn.norm_activation(self.norm, self.relu, y, y)


class LayerCalledTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


class NormCalledTwice(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)))


class NormFirst(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class SomethingBetween(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.relu(self.conv(x)))


class WeightReadDirectly(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.sum()


class NormUnderTwoNames(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.conv(x))


class OwnConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


class OwnLayer(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.conv = OwnConv2d(4, 4, 3, padding=1)


class BatchStatistics(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)


@pytest.mark.parametrize(
    "network",
    [
        AnotherReader,
        OwnResidual,
        LayerCalledTwice,
        NormCalledTwice,
        NormFirst,
        SomethingBetween,
        WeightReadDirectly,
        NormUnderTwoNames,
        OwnLayer,
        BatchStatistics,
    ],
)
def test_pairs_that_something_else_needs_are_left(network: type[Pair]) -> None:
    assert_fused(filled(network()).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64), 1)


def test_a_parametrised_weight_is_left() -> None:
    model = filled(Pair()).double()
    torch.nn.utils.parametrizations.weight_norm(model.conv)
    assert_fused(model, torch.randn(2, 4, 6, 6, dtype=torch.float64), 1)


def test_a_norm_in_training_mode_is_left() -> None:
    model = filled(Pair())
    model.norm.train()
    dlkernels.fuse(model)
    assert count_norms(model) == 1


@pytest.mark.parametrize("watched", ["0", "0.1", "1", "1.0"])
def test_a_hook_between_layer_and_norm_keeps_them_apart(watched: str) -> None:
    before = torch.nn.Sequential(torch.nn.ReLU(), nn.Conv2d(4, 4, 3))
    after = torch.nn.Sequential(nn.BatchNorm2d(4), torch.nn.ReLU())
    model = filled(torch.nn.Sequential(before, after)).double()
    seen: list[Tensor] = []
    model.get_submodule(watched).register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_fused(model, torch.randn(2, 4, 6, 6, dtype=torch.float64), 1)
    assert len(seen) == 2


def test_a_hook_around_both_is_no_obstacle() -> None:
    model = filled(torch.nn.Sequential(Pair())).double()
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    assert_fused(model, torch.randn(2, 4, 6, 6, dtype=torch.float64), 0)


def test_the_rest_of_a_norms_call_is_kept() -> None:
    class WithKeywords(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x), activation="relu", residual=x)

    assert_fused(filled(WithKeywords()).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64), 0)


def test_a_shared_weight_stays_what_it_was_elsewhere() -> None:
    model = torch.nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    assert_fused(filled(model).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64), 0)


def test_a_norm_over_the_positions_of_a_sequence_is_left() -> None:
    model = filled(torch.nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4))).double()
    assert_fused(model, torch.randn(2, 4, 3, dtype=torch.float64), 1)


def test_a_linear_layer_that_is_folded_into_takes_no_sequences_any_more() -> None:
    model = dlkernels.fuse(filled(torch.nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))))
    assert model(torch.randn(4, 3)).shape == (4, 5)
    with pytest.raises(AssertionError, match="a folded batch norm takes 2 dimensions"):
        model(torch.randn(4, 5, 3))


def test_folding_twice_changes_nothing_and_torch_fx_still_traces() -> None:
    model = dlkernels.fuse(filled(ResNet(BasicBlock, (1, 1, 1, 1), 5, layers=torch.nn)).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_fused(model, x, 0)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        dlkernels.fuse(Pair())


def test_a_model_that_cannot_be_traced_is_refused_and_unchanged() -> None:
    class Branches(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Branches().eval()
    with pytest.raises(ValueError, match="torch.fx cannot trace Branches, so nothing was folded: .*control flow"):
        dlkernels.fuse(model)
    assert count_norms(model) == 1
