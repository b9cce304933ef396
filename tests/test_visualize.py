"""Seeing inside: closed forms and invariants of each subject, on every classifier, which is left as it was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlkernels import data, models, nn, visualize
from dlkernels.models.densenet import DenseNet
from dlkernels.models.googlenet import Inception
from dlkernels.models.resnet import BasicBlock, ResNet
from dlkernels.visualize.class_images import blurred

from .cases.classifiers import CLASSES, CLASSIFIERS
from .cases.learning import accuracy, fit

pytest.importorskip("captum")
pytest.importorskip("sklearn")
matplotlib = pytest.importorskip("matplotlib")

LAYERS = pytest.mark.parametrize("layers", [nn, torch.nn], ids=["dlkernels", "torch"])
Inspect = Callable[[torch.nn.Module, Tensor, Tensor], object]


def last_leaf(model: torch.nn.Module) -> str:
    """The last module that is called and has no modules of its own."""
    return [name for name, module in model.named_modules() if not list(module.children())][-1]


# Everything that is done with a network: of the network, two images and their classes.
INSPECTIONS: dict[str, Inspect] = {
    "filters": lambda model, x, y: visualize.first_layer_filters(model, tuple(x.shape[1:])),
    "features": lambda model, x, y: visualize.last_features(model, x),
    "activation_maps": lambda model, x, y: visualize.activation_maps(model, x, last_leaf(model)),
    "maximal_patches": lambda model, x, y: visualize.maximal_patches(model, x, last_leaf(model), 1, 2),
    "occlusion": lambda model, x, y: visualize.occlusion(model, x, y, x.shape[2] // 2, x.shape[2] // 2),
    "exact_shapley": lambda model, x, y: visualize.shapley_values(model, x, y, x.shape[2] // 2),
    "sampled_shapley": lambda model, x, y: visualize.shapley_values(model, x, y, x.shape[2] // 2, permutations=2),
    "saliency": lambda model, x, y: visualize.saliency(model, x, y),
    "guided_backprop": lambda model, x, y: visualize.guided_backprop(model, x, y),
    "class_images": lambda model, x, y: visualize.class_images(model, y, tuple(x.shape[1:]), steps=2),
    "fgsm": lambda model, x, y: visualize.fgsm(model, x, y, 0.1),
    "targeted_attack": lambda model, x, y: visualize.targeted_attack(model, x, y, 0.1, 0.1, steps=2),
    "accuracy_under_attack": lambda model, x, y: visualize.accuracy_under_attack(model, x, y, [0.1]),
}
WITHOUT_RECTIFIERS = {"linear", "lenet5"}


def tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from tensors_in(part)
    elif hasattr(result, "__dataclass_fields__"):
        yield from tensors_in(list(vars(result).values()))


def random_images(shape: tuple[int, ...], count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def classes_of(*classes: int) -> Tensor:
    return torch.tensor(classes)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


class Pixels(torch.nn.Module):
    """Logits that are chosen functions of the pixels."""

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scores = scores
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


def linear_model(shape: tuple[int, int, int] = (2, 4, 4), dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(2)
    model = models.LinearClassifier(math.prod(shape), CLASSES).to(dtype)
    torch.nn.init.normal_(model.scores.weight)
    torch.nn.init.normal_(model.scores.bias)
    return model


@cache
def digits() -> data.Split:
    return data.load_digits(0)


@cache
def trained_lenet() -> torch.nn.Module:
    """A LeNet that recognises digits; nothing may change it."""
    torch.manual_seed(0)
    model, loss = models.LeNet(8), nn.CrossEntropyLoss()
    images, labels = digits().train_images, digits().train_labels
    fit(model.parameters(), lambda x, y: loss(model(x), y), images, labels, epochs=6, learning_rate=3e-3)
    assert accuracy(model, digits().test_images, digits().test_labels) >= 0.97
    return model


def pixel_range() -> tuple[float, float]:
    return digits().train_images.min().item(), digits().train_images.max().item()


# ---- On every classifier, which is left as it was found --------------------------------------------------------------


@LAYERS
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_can_be_seen_into(name: str, layers: ModuleType) -> None:
    build, shape = CLASSIFIERS[name]
    model, x = build(layers), random_images(shape)
    for subject, inspect in INSPECTIONS.items():
        if subject == "guided_backprop" and name in WITHOUT_RECTIFIERS:
            with pytest.raises(ValueError, match="model must have a rectifier"):
                inspect(model, x, classes_of(0, 1))
            continue
        for tensor in tensors_in(inspect(model, x, classes_of(0, 1))):
            assert tensor.isfinite().all(), subject
            assert not tensor.requires_grad, subject


@contextmanager
def left_as_found(model: torch.nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Fails if anything of the model, the tensors or the generator has changed at the end."""

    def state() -> list[object]:
        modules = [
            (
                module.training,
                [list(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")],
                [parameter.requires_grad for parameter in module.parameters()],
            )
            for module in model.modules()
        ]
        return [modules, torch.is_grad_enabled(), [tensor.requires_grad for tensor in tensors]]

    def values() -> list[Tensor]:
        found = [*model.state_dict().values(), *tensors, torch.get_rng_state()]
        return [tensor.clone() for tensor in (*found, *(p.grad for p in model.parameters() if p.grad is not None))]

    before, values_before = state(), values()
    yield
    assert state() == before
    torch.testing.assert_close(values(), values_before, rtol=0, atol=0)


@pytest.mark.parametrize("subject", INSPECTIONS)
def test_the_network_is_left_as_it_was_found(subject: str) -> None:
    model, x, y = CLASSIFIERS["resnet"][0](nn), random_images((3, 32, 32)), classes_of(0, 1)
    model.train()
    layer: Any = model.layer2
    layer.eval()
    layer.requires_grad_(False)
    calls: list[object] = []
    layer.register_forward_hook(lambda *arguments: calls.append(arguments))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    x.requires_grad_()
    with left_as_found(model, x, y):
        INSPECTIONS[subject](model, x, y)
    if subject != "filters":
        with left_as_found(model, x, y), pytest.raises(RuntimeError):
            INSPECTIONS[subject](model, x[:, :1], y)  # the network takes three channels
    assert x.grad is None
    assert bool(calls) == (subject != "filters")  # the user's own hooks go on


@pytest.mark.parametrize("subject", ["saliency", "guided_backprop", "class_images", "fgsm", "targeted_attack"])
def test_gradients_are_taken_even_where_they_are_switched_off(subject: str) -> None:
    model, x, y = CLASSIFIERS["lenet"][0](nn), random_images((1, 8, 8)), classes_of(0, 1)
    expected = list(tensors_in(INSPECTIONS[subject](model, x, y)))
    with torch.no_grad():
        torch.testing.assert_close(list(tensors_in(INSPECTIONS[subject](model, x, y))), expected, rtol=0, atol=0)


# ---- Filters, features, embeddings, neighbours -----------------------------------------------------------------------


def test_filters_are_the_weights_of_the_first_convolution() -> None:
    model: Any = CLASSIFIERS["resnet"][0](nn)
    filters = visualize.first_layer_filters(model)
    assert filters.shape == (64, 3, 7, 7)
    assert torch.equal(filters, model.conv1.weight)
    filters.zero_()
    assert model.conv1.weight.abs().max() > 0


def test_filters_of_a_linear_classifier_are_its_templates() -> None:
    model = linear_model((2, 4, 4))
    templates = visualize.first_layer_filters(model, (2, 4, 4))
    x = random_images((2, 4, 4), dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("nchw,kchw->nk", x, templates) + model.scores.bias, model(x))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_are_what_the_last_linear_layer_makes_logits_of(name: str) -> None:
    build, shape = CLASSIFIERS[name]
    model, x = build(nn).eval(), random_images(shape)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        assert_close(last(visualize.last_features(model, x)), model(x) + 0.0, 1e-5)


def test_features_do_not_depend_on_how_many_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained_lenet(), digits().test_images[:7]
    expected = visualize.last_features(model, x)
    monkeypatch.setattr(visualize.features, "BATCH_SIZE", 3)
    assert_close(visualize.last_features(model, x), expected, 1e-6)


def test_pca_finds_the_plane_that_points_lie_in() -> None:
    plane = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q
    inside = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    points, shares = visualize.pca(inside @ plane.T)
    torch.testing.assert_close(torch.pdist(points), torch.pdist(inside))
    assert shares.sum().item() == pytest.approx(1)
    assert shares[0] > shares[1]


def test_tsne_keeps_classes_together_and_repeats() -> None:
    images, labels = digits().test_images[:200], digits().test_labels[:200]
    features = visualize.last_features(trained_lenet(), images)
    points = visualize.tsne(features, perplexity=15)
    assert points.shape == (200, 2)
    assert torch.equal(points, visualize.tsne(features, perplexity=15))
    indices, _ = visualize.nearest_neighbours(points, points, 2)
    assert (labels[indices[:, 1]] == labels).double().mean() >= 0.95


def test_nearest_neighbours_are_those_of_the_distances() -> None:
    features, queries = torch.randn(40, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    indices, distances = visualize.nearest_neighbours(queries, features, 4)
    expected, order = torch.cdist(queries, features).sort(1)
    torch.testing.assert_close(distances, expected[:, :4])
    assert torch.equal(indices, order[:, :4])


# ---- Activation maps and maximally activating patches ----------------------------------------------------------------


@LAYERS
def test_activation_maps_are_what_the_layer_returns_though_it_is_computed_in_one_with_its_norm(
    layers: ModuleType,
) -> None:
    model: Any = CLASSIFIERS["lenet"][0](layers)
    model(random_images((1, 8, 8), 16))  # moves the statistics
    x, block = random_images((1, 8, 8)), model.features[0]
    maps = visualize.activation_maps(model, x, "features.0.activation")
    with torch.no_grad():
        block.eval()
        assert_close(maps, torch.relu(block.norm(block.conv(x))), 1e-6)
        assert_close(visualize.activation_maps(model, x, "features.0.norm"), block.norm(block.conv(x)), 1e-6)


def field_of_a_chain(layers: list[dict[str, int]], size: int) -> list[set[int]]:
    """For each unit of the last layer the pixels of a line that it reads, by the arithmetic of windows."""
    fields = [{pixel} for pixel in range(size)]
    for layer in layers:
        if not fields:
            return []  # smaller than a window
        reach = layer["dilation"] * (layer["kernel_size"] - 1)
        starts = range(-layer["padding"], len(fields) + layer["padding"] - reach, layer["stride"])
        windows = [range(start, start + reach + 1, layer["dilation"]) for start in starts]
        fields = [set().union(*(fields[i] for i in window if 0 <= i < len(fields))) for window in windows]
    return fields


LAYER = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 4),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
    }
).map(lambda layer: {**layer, "padding": min(layer["padding"], layer["kernel_size"] // 2)})


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["conv", "depthwise", "max"]), LAYER), min_size=1, max_size=4))
def test_receptive_fields_are_those_of_the_arithmetic(chain: list[tuple[str, dict[str, int]]]) -> None:
    height, width, channels = 13, 10, 4
    modules: list[torch.nn.Module] = []
    for kind, layer in chain:
        if kind == "max":
            modules.append(torch.nn.MaxPool2d(**layer))
        else:
            modules += [nn.Conv2d(channels, channels, groups=channels if kind == "depthwise" else 1, **layer)]
            modules += [nn.BatchNorm2d(channels), torch.nn.ReLU()]
    model = nn.Sequential(torch.nn.Conv2d(1, channels, 1), *modules)
    expected = [field_of_a_chain([layer for _, layer in chain], size) for size in (height, width)]
    if not all(expected):
        return
    rows, columns = visualize.receptive_fields(model, str(len(modules)), 1, (1, height, width))
    assert rows.shape == (len(expected[0]), len(expected[1]), height)
    for i, j in product(range(rows.shape[0]), range(rows.shape[1])):
        assert set(rows[i, j].nonzero().flatten().tolist()) == expected[0][i]
        assert set(columns[i, j].nonzero().flatten().tolist()) == expected[1][j]


class TiledConv2d(torch.nn.Conv2d):
    """A convolution that, as fast algorithms do, computes four outputs together: a NaN of one is a NaN of all."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        spread = torch.nn.functional.max_pool2d(outputs.isnan().float(), 2).repeat_interleave(2, 2)
        return outputs.masked_fill(spread.repeat_interleave(2, 3) > 0, torch.nan)


def test_receptive_fields_do_not_depend_on_how_convolutions_are_computed() -> None:
    model = torch.nn.Sequential(TiledConv2d(1, 1, 3, padding=1), torch.nn.ReLU(), TiledConv2d(1, 1, 3, padding=1))
    assert model(torch.full((1, 1, 8, 8), torch.nan)).isnan().all()
    rows, _ = visualize.receptive_fields(model, "2", 0, (1, 8, 8))
    assert rows[3, 3].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


def test_channels_of_different_groups_have_different_receptive_fields() -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Conv2d(1, 2, 1)
            self.wide = nn.Conv2d(1, 2, 5, padding=2)
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.grouped(torch.cat([self.narrow(x), self.wide(x)], 1))

    for channel, reach in ((0, 1), (1, 1), (2, 3), (3, 3)):
        rows, columns = visualize.receptive_fields(Branches(), "grouped", channel, (1, 9, 9))
        assert rows[4, 4].nonzero().flatten().tolist() == list(range(4 - reach, 5 + reach))
        assert torch.equal(rows[4, 4], columns[4, 4])


def smooth(model: torch.nn.Module) -> torch.nn.Module:
    """With activations and pooling through which every gradient passes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.ReLU):
            model.set_submodule(name, torch.nn.Softplus())
        elif isinstance(module, torch.nn.MaxPool2d):
            model.set_submodule(name, torch.nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
    return model


@pytest.mark.parametrize(
    ("build", "layer", "size"),
    [
        (lambda layers: ResNet(BasicBlock, (1, 1, 1, 1), layers=layers), "layer2.0", 70),
        (lambda layers: ResNet(BasicBlock, (1, 1, 1, 1), layers=layers), "fc", 20),
        (lambda layers: DenseNet(4, (2, 2), 4, layers=layers), "features.denseblock2.denselayer2", 50),
        (lambda layers: Inception(3, 4, 4, 4, 4, 4, 4, layers), "branch3.1", 9),
        (lambda layers: Inception(3, 4, 4, 4, 4, 4, 4, layers), "branch4", 9),
    ],
    ids=["resnet", "whole image", "densenet", "inception 3x3", "inception pooling"],
)
def test_receptive_fields_are_where_the_gradient_is_not_zero(
    build: Callable[[ModuleType], torch.nn.Module], layer: str, size: int
) -> None:
    torch.manual_seed(3)
    ours, theirs = build(nn), smooth(build(torch.nn)).double().eval()
    rows, columns = visualize.receptive_fields(ours, layer, 1, (3, size, size))
    outputs: list[Tensor] = []
    theirs.get_submodule(layer).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = torch.randn(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    theirs(x)
    units = outputs[0][:, 1].reshape(1, *rows.shape[:2])
    for i, j in {(0, 0), (rows.shape[0] // 2, rows.shape[1] // 2), (rows.shape[0] - 1, 0)}:
        (gradient,) = torch.autograd.grad(units[0, i, j], x, retain_graph=True)
        touched = gradient[0].ne(0).any(0)
        assert torch.equal(touched, rows[i, j][:, None] & columns[i, j])


@LAYERS
def test_patches_are_the_pixels_that_alone_decide_the_strongest_responses(layers: ModuleType) -> None:
    model: Any = CLASSIFIERS["preact_resnet"][0](layers)
    layer, channel = "features.3", 5
    images = random_images((3, 40, 40), 12)
    found = visualize.maximal_patches(model, images, layer, channel, 4)
    maps = visualize.activation_maps(model, images, layer)[:, channel]
    assert_close(found.activations, maps.flatten(1).amax(1).sort(descending=True).values[:4], 1e-6)
    assert len(set(found.images.tolist())) == 4
    for patch, box, index, activation in zip(
        found.patches, found.boxes.tolist(), found.images, found.activations, strict=True
    ):
        top, left, bottom, right = box
        assert torch.equal(patch, images[index, :, top:bottom, left:right])
        assert (bottom - top, right - left) <= (11, 11)  # 7x7 by two, then 3x3 by two
        for elsewhere in (torch.zeros(1, 3, 40, 40), torch.full((1, 3, 40, 40), 9.0)):
            elsewhere[0, :, top:bottom, left:right] = patch
            response = visualize.activation_maps(model, elsewhere, layer)[0, channel]
            position = maps[index].argmax()
            torch.testing.assert_close(response.flatten()[position], activation, rtol=1e-4, atol=1e-5)


def test_patches_of_a_filter_are_those_that_match_it() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, bias=False), torch.nn.Flatten())
    cross = torch.tensor([[-1.0, 1, -1], [1, 1, 1], [-1, 1, -1]])
    model[0].weight.data.copy_(cross)  # type: ignore[operator, union-attr]
    images = torch.zeros(3, 1, 9, 9)
    images[1, 0, 2:5, 4:7] = cross.clamp(min=0)
    found = visualize.maximal_patches(model, images, "0", 0, 1)
    assert found.boxes.tolist() == [[2, 4, 5, 7]]
    assert found.images.tolist() == [1]
    assert found.activations.tolist() == [5]


# ---- Occlusion and Shapley values ------------------------------------------------------------------------------------


def test_what_the_network_does_not_read_can_be_occluded() -> None:
    model = Pixels(lambda x: torch.stack([x[:, :, :, :4].sum((1, 2, 3)), x[:, 0, 0, 0]], 1))
    drops = visualize.occlusion(model, random_images((2, 8, 8)), classes_of(0, 1), size=2)
    assert (drops[:, :, 5:] == 0).all()
    assert (drops[0, :, :4] != 0).all()


def test_occlusion_is_the_mean_fall_over_the_squares_that_cover_a_pixel() -> None:
    model, x, y = linear_model(), random_images((2, 4, 4), dtype=torch.float64), classes_of(3, 1)
    drops = visualize.occlusion(model, x, y, size=3, value=0.5)
    with torch.no_grad():
        before = model(x).softmax(1)[[0, 1], y]
        total, count = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(4, 4)
        for top, left in product(range(2), range(2)):
            covered = x.clone()
            covered[:, :, top : top + 3, left : left + 3] = 0.5
            total[:, top : top + 3, left : left + 3] += (before - model(covered).softmax(1)[[0, 1], y])[:, None, None]
            count[top : top + 3, left : left + 3] += 1
    assert_close(drops, total / count, 1e-6)


def test_occluding_a_digit_hurts_where_the_digit_is() -> None:
    images, labels = digits().test_images[:50], digits().test_labels[:50]
    drops = visualize.occlusion(trained_lenet(), images, labels, size=3, value=pixel_range()[0])
    ink = images[:, 0] > images.mean()
    assert drops[ink].mean() > 2 * drops[~ink].mean()


@pytest.mark.parametrize("permutations", [None, 1, 3])
def test_shapley_values_add_up_to_what_the_image_has_over_the_baseline(permutations: int | None) -> None:
    model, x, y = trained_lenet(), digits().test_images[:3], digits().test_labels[:3]
    values = visualize.shapley_values(model, x, y, 4, permutations, baseline=-0.5)
    assert values.shape == (3, 2, 2)
    with torch.no_grad():
        scores = model.eval()(torch.cat([x, torch.full_like(x[:1], -0.5)]))[:, y]
    torch.testing.assert_close(values.sum((1, 2)), scores[:3].diagonal() - scores[3], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("permutations", [None, 1])
def test_shapley_values_of_a_linear_classifier_are_weight_times_difference(permutations: int | None) -> None:
    model, x, y = linear_model(), random_images((2, 4, 4), dtype=torch.float64), classes_of(3, 1)
    values = visualize.shapley_values(model, x, y, 2, permutations, baseline=0.3)
    products = visualize.first_layer_filters(model, (2, 4, 4))[y] * (x - 0.3)
    expected = products.sum(1).unfold(1, 2, 2).unfold(2, 2, 2).sum((3, 4))
    assert_close(values, expected, 1e-9 if permutations is None else 1e-6)


def test_shapley_values_share_what_only_both_patches_give_and_nothing_goes_to_who_gives_nothing() -> None:
    model = Pixels(lambda x: torch.stack([x[:, 0, 0, 0] * x[:, 0, 0, 1], x[:, 0, 1, 0]], 1))
    x = torch.tensor([[[[2.0, 3.0], [7.0, 1.0]]]])
    assert_close(visualize.shapley_values(model, x, classes_of(0), 1), torch.tensor([[[3.0, 3.0], [0.0, 0.0]]]), 1e-6)


def test_exact_shapley_values_are_captums_and_samples_approach_them() -> None:
    from captum.attr import ShapleyValues

    model, x, y = trained_lenet(), digits().test_images[:1], digits().test_labels[:1]
    exact = visualize.shapley_values(model, x, y, 4)
    mask = torch.arange(4).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1).view(1, 1, 8, 8)
    theirs = ShapleyValues(model.eval()).attribute(x, target=y, feature_mask=mask)
    assert_close(exact, theirs[:, 0, ::4, ::4], 1e-5)
    finer = visualize.shapley_values(model, x, y, 2)
    errors = [(visualize.shapley_values(model, x, y, 2, n) - finer).abs().mean() for n in (4, 256)]
    assert errors[1] < 0.3 * errors[0]
    assert_close(visualize.shapley_values(model, x, y, 2, 256), finer, 0.1)


def test_sampled_shapley_values_repeat_with_their_seed() -> None:
    model, x, y = trained_lenet(), digits().test_images[:1], digits().test_labels[:1]
    first, again, other = (visualize.shapley_values(model, x, y, 2, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---- Saliency, guided backpropagation, class images ------------------------------------------------------------------


def test_saliency_of_a_linear_classifier_is_its_weight() -> None:
    model, x = linear_model(), random_images((2, 4, 4), 3, torch.float64)
    gradients = visualize.saliency(model, x, classes_of(4, 0, 2))
    assert torch.equal(gradients, visualize.first_layer_filters(model, (2, 4, 4))[[4, 0, 2]])


def test_saliency_predicts_what_a_small_change_does() -> None:
    build, shape = CLASSIFIERS["efficientnet"]
    model, x = build(nn).double().eval(), random_images(shape, dtype=torch.float64)
    change = 1e-6 * torch.randn_like(x)
    gradients = visualize.saliency(model, x, classes_of(1, 3))
    with torch.no_grad():
        differences = (model(x + change) - model(x - change))[[0, 1], [1, 3]] / 2
    torch.testing.assert_close((gradients * change).sum((1, 2, 3)), differences, rtol=1e-5, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients:UserWarning")
@pytest.mark.parametrize("name", ["lenet", "resnet", "densenet", "preact_resnet"])
def test_guided_backprop_is_captums_and_the_same_where_norm_and_relu_are_one_kernel(name: str) -> None:
    from captum.attr import GuidedBackprop

    build, shape = CLASSIFIERS[name]
    ours, theirs = build(nn).double(), build(torch.nn).double().eval()
    theirs.load_state_dict(ours.state_dict())
    x, y = random_images(shape, dtype=torch.float64), classes_of(1, 3)
    gradients = visualize.guided_backprop(ours, x, y)
    assert_close(gradients, GuidedBackprop(theirs).attribute(x, target=y), 1e-9)
    assert not torch.allclose(gradients, visualize.saliency(ours, x, y), rtol=1e-2, atol=0)


def test_guided_backprop_lets_only_positive_gradients_pass() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    for layer, weight in ((1, [[1.0, -2.0], [3.0, 5.0]]), (3, [[7.0, -11.0], [1.0, 1.0]])):
        model[layer].weight.data.copy_(torch.tensor(weight))  # type: ignore[operator, union-attr]
        model[layer].bias.data.fill_(10.0)  # type: ignore[operator, union-attr]
    x = torch.ones(1, 1, 1, 2)
    assert visualize.guided_backprop(model, x, classes_of(0)).flatten().tolist() == [7, -14]
    assert visualize.saliency(model, x, classes_of(0)).flatten().tolist() == [7 - 33, -14 - 55]


def test_class_images_of_a_linear_classifier_are_its_templates() -> None:
    model = linear_model()
    images, _ = visualize.class_images(
        model, classes_of(2, 0), (2, 4, 4), steps=400, step_size=0.3, decay=0.1, blur_width=0
    )
    templates = visualize.first_layer_filters(model, (2, 4, 4))[[2, 0]]
    size = templates.square().mean((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(images, 0.3 * (1 - 0.1) / 0.1 * templates / size)  # where growth and decay balance


def test_class_images_are_recognised_as_their_class() -> None:
    model, classes = trained_lenet(), torch.arange(10)
    images, probabilities = visualize.class_images(model, classes, (1, 8, 8), steps=100)
    assert (probabilities > 0.99).all()
    with torch.no_grad():
        assert torch.equal(model.eval()(images).argmax(1), classes)


def test_regularisers_of_class_images_do_what_they_say() -> None:
    model, one = linear_model((2, 10, 10)), classes_of(1)

    def image(**arguments: float) -> Tensor:
        plain: dict[str, Any] = {"steps": 20, "decay": 0.0, "blur_width": 0.0, **arguments}
        return visualize.class_images(model, one, (2, 10, 10), **plain)[0]

    def roughness(x: Tensor) -> float:
        return (x.diff(dim=2).square().mean() / x.square().mean()).item()

    plain = image()
    assert image(decay=0.1).norm() < 0.5 * plain.norm()
    assert roughness(image(blur_width=1.0, blur_every=1)) < 0.3 * roughness(plain)
    assert roughness(plain) > roughness(image(blur_width=1.0, blur_every=7)) > roughness(image(blur_width=1.0))
    for name in ("norm_percentile", "contribution_percentile"):
        clipped = image(**{name: 30.0})
        assert clipped.eq(0).all(1).sum() == 30  # of 100 pixels, all of their channels
        assert clipped.abs().sum(1)[clipped.abs().sum(1) > 0].min() > 0


def test_what_contributes_least_is_clipped_whatever_its_sign() -> None:
    weight = torch.randn(2, 6, 6, dtype=torch.float64)
    model = Pixels(lambda x: (weight * x.sin()).sum((2, 3))).double()
    images, _ = visualize.class_images(
        model, classes_of(0), (2, 6, 6), steps=2, step_size=2.0, decay=0.0, blur_width=0.0, contribution_percentile=50.0
    )
    expected = torch.zeros_like(weight)
    for _ in range(2):
        gradient = weight * expected.cos() * torch.tensor([1.0, 0.0]).view(2, 1, 1)  # class 0 reads channel 0 alone
        expected = expected + 2.0 * gradient / gradient.square().mean().sqrt()
        contribution = (expected * gradient).sum(0)
        expected = expected * (contribution.abs() >= contribution.abs().flatten().sort().values[18])
    assert (contribution < 0).any()
    assert (images != 0).any(1).sum() == 18
    torch.testing.assert_close(images[0], expected)


def test_blur_is_scipys() -> None:
    from scipy.ndimage import gaussian_filter

    x = random_images((3, 9, 7), dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), 1.5, mode="nearest", radius=5, axes=(2, 3))
    torch.testing.assert_close(blurred(x, 1.5), torch.from_numpy(expected))


# ---- Adversarial images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.25, 0.1])
def test_a_fast_gradient_sign_step_and_noise_are_exactly_epsilon(epsilon: float) -> None:
    model, x = linear_model(), random_images((2, 4, 4), dtype=torch.float64)
    attacked = visualize.fgsm(model, x, classes_of(0, 1), epsilon)
    noisy = visualize.random_noise(x, epsilon)
    for changed in (attacked, noisy):
        torch.testing.assert_close((changed - x).abs(), torch.full_like(x, epsilon), rtol=0, atol=1e-15)
    assert (noisy - x).mean().abs() < 0.9 * epsilon or epsilon == 0  # signs differ


def test_the_fast_gradient_sign_method_is_captums() -> None:
    from captum.robust import FGSM

    model, x, y = trained_lenet().eval(), digits().test_images[:20], digits().test_labels[:20]
    low, high = pixel_range()
    theirs = FGSM(model, torch.nn.CrossEntropyLoss(reduction="none"), low, high)
    theirs.zero_thresh = 0
    expected = theirs.perturb(x.clone().requires_grad_(), 0.3, y)
    torch.testing.assert_close(visualize.fgsm(model, x, y, 0.3, (low, high)), expected.detach())


def test_a_network_that_is_sure_can_be_attacked_too() -> None:
    model, x = linear_model((1, 4, 4), torch.float32), random_images((1, 4, 4), 1)
    with torch.no_grad():
        label = model(x).argmax(1)
        model.scores.weight *= 1000 / model(x).std()
    attacked = visualize.fgsm(model, x, label, 0.1)
    torch.testing.assert_close((attacked - x).abs(), torch.full_like(x, 0.1))


def test_fgsm_hurts_far_more_than_noise_of_the_same_size() -> None:
    images, labels = digits().test_images, digits().test_labels
    attacked, noisy = visualize.accuracy_under_attack(
        trained_lenet(), images, labels, [0.0, 0.3], pixel_range=pixel_range()
    )
    assert attacked[0] == noisy[0] >= 0.97
    assert noisy[1] >= noisy[0] - 0.03
    assert attacked[1] <= noisy[1] - 0.3


def test_twenty_of_twenty_digits_are_taken_for_another_within_the_bound() -> None:
    model, images, labels = trained_lenet(), digits().test_images[:20], digits().test_labels[:20]
    bound, (low, high) = 1.0, pixel_range()  # 6 of the scans' 16 shades
    targets = (labels + 1) % 10
    attack = visualize.targeted_attack(model, images, targets, bound, 0.1, pixel_range=(low, high))
    assert attack.fooled.all()
    with torch.no_grad():
        assert torch.equal(model.eval()(attack.images).argmax(1), targets)
    assert (attack.images - images).abs().max() <= bound + 1e-6
    assert (attack.images - images).abs().amax((1, 2, 3)).max() <= 0.1 * attack.steps.max() + 1e-6
    assert attack.images.min() >= low and attack.images.max() <= high


def test_an_attack_stops_where_it_has_succeeded_and_says_where_it_has_not() -> None:
    model, x = linear_model((1, 4, 4)), random_images((1, 4, 4), 6, torch.float64)
    seen = model(x).argmax(1)
    targets = torch.where(torch.arange(6) % 2 == 0, seen, (seen + 1) % CLASSES)
    attack = visualize.targeted_attack(model, x, targets, bound=0.02, step_size=0.01, steps=5)
    assert torch.equal(attack.images[::2], x[::2]) and attack.fooled[::2].all() and (attack.steps[::2] == 0).all()
    assert torch.equal(attack.fooled, model(attack.images).argmax(1) == targets)
    assert not attack.fooled.all()
    assert (attack.steps[~attack.fooled] == 5).all()
    assert (attack.images - x).abs().max() <= 0.02 + 1e-12


# ---- Figures ---------------------------------------------------------------------------------------------------------


def figures(channels: int) -> Iterator[tuple[str, Any]]:
    """Every figure, of a network on small images."""
    model = models.ThreeLayerConvNet(8, channels, CLASSES, 6, 3, 8)
    x, y = random_images((channels, 8, 8), 20), torch.arange(20) % CLASSES
    few, classes = x[:3], y[:3]
    features = visualize.last_features(model, x)
    yield "filters", visualize.draw_filters(visualize.first_layer_filters(model))
    yield "pca", visualize.draw_embedding(visualize.pca(features)[0], y, "PCA of the last layer")
    yield "tsne", visualize.draw_embedding(visualize.tsne(features, perplexity=5), y, "t-SNE of the last layer")
    found = visualize.nearest_neighbours(features[:2], features, 4)
    yield "neighbours", visualize.draw_neighbours(x[:2], y[:2], x, y, *found)
    maps = visualize.activation_maps(model, few, "conv_activation")
    yield "activation_maps", visualize.draw_activation_maps(x[0], maps[0], "conv_activation")
    patches = visualize.maximal_patches(model, x, "conv", 2, 4)
    yield "maximal_patches", visualize.draw_maximal_patches(patches, x, "conv", 2)
    yield "occlusion", visualize.draw_occlusion(few, visualize.occlusion(model, few, classes, 3), classes)
    yield "shapley", visualize.draw_shapley_values(few, visualize.shapley_values(model, few, classes, 4), classes)
    yield "saliency", visualize.draw_saliency(few, visualize.saliency(model, few, classes), classes)
    yield "guided", visualize.draw_guided_backprop(few, visualize.guided_backprop(model, few, classes), classes)
    images, probabilities = visualize.class_images(model, classes, (channels, 8, 8), steps=3)
    yield "class_images", visualize.draw_class_images(images, probabilities, classes)
    yield "attack", visualize.draw_attack(few, visualize.fgsm(model, few, classes, 0.1), classes, classes)
    sizes = [0.0, 0.1]
    accuracies = visualize.accuracy_under_attack(model, x, y, sizes)
    yield "accuracy_under_attack", visualize.draw_accuracy_under_attack(sizes, *accuracies)


@pytest.mark.parametrize("channels", [2, 3])
def test_every_figure_is_labelled_and_written_as_png(channels: int, tmp_path: Path) -> None:
    drawn = dict(figures(channels))
    written = {getattr(visualize, name) for name in visualize.__all__ if name.startswith("draw_")}
    assert len(drawn) == len(written) + 1  # an embedding is drawn twice
    for name, figure in drawn.items():
        texts = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
        assert any(texts), name
        labelled = [axis.get_ylabel() for axis in figure.axes if axis.axison]
        assert all(labelled), name
        path = visualize.save(figure, tmp_path / "pictures" / f"{name}.png")
        picture = matplotlib.image.imread(path)
        assert picture.ndim == 3 and picture[..., :3].std() > 0.02, name


def test_maps_have_zero_in_the_middle_of_their_colours_and_one_scale_where_numbers_are_to_be_compared() -> None:
    images, maps = random_images((1, 4, 4)), torch.tensor([[[[-3.0, 1.0]]], [[[0.5, 0.0]]]])
    compared = visualize.draw_occlusion(images, maps[:, 0], classes_of(0, 1))
    assert [axis.images[0].get_clim() for axis in compared.axes[2:4]] == [(-3, 3), (-3, 3)]
    alone = visualize.draw_saliency(images, maps, classes_of(0, 1))
    assert [axis.images[0].get_clim() for axis in alone.axes[2:4]] == [(-3, 3), (-0.5, 0.5)]


def test_a_figure_is_saved_as_png_alone(tmp_path: Path) -> None:
    figure = visualize.draw_filters(torch.randn(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"path must end in \.png, got .*figure.jpg"):
        visualize.save(figure, tmp_path / "figure.jpg")


# ---- Bad input -------------------------------------------------------------------------------------------------------

X, Y = random_images((1, 8, 8)), classes_of(0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: visualize.saliency(m, X[0], Y),
            r"images must be floating \[N, C, H, W\], N > 0, got .* \[1, 8, 8\]",
        ),
        (lambda m: visualize.saliency(m, X[:0], Y[:0]), r"images must be floating .*\[0, 1, 8, 8\]"),
        (lambda m: visualize.saliency(m, X.long(), Y), "images must be floating .* got torch.int64"),
        (lambda m: visualize.saliency(m, X, classes_of(0)), r"classes must be int64 \[2\], got torch.int64 \[1\]"),
        (lambda m: visualize.fgsm(m, X, classes_of(0, 5), 0.1), r"classes must be in \[0, 5\), got \[0, 5\]"),
        (lambda m: visualize.fgsm(m, X, Y, -0.1), "epsilon must not be negative, got -0.1"),
        (lambda m: visualize.random_noise(X, math.nan), "epsilon must not be negative, got nan"),
        (lambda m: visualize.targeted_attack(m, X, Y, -1.0, 0.1), "bound must not be negative, got -1.0"),
        (lambda m: visualize.targeted_attack(m, X, Y, 1.0, -0.1), "step_size must not be negative, got -0.1"),
        (lambda m: visualize.saliency(m.features, X, Y), r"model must return logits \[1, classes\] for 1 images, got"),
        (lambda m: visualize.activation_maps(m, X, "features.0.con"), "LeNet, got 'features.0.con'; the closest: feat"),
        (lambda m: visualize.maximal_patches(m, X, "features.0", 99, 1), r"channel must be in \[0, 16\), got 99"),
        (lambda m: visualize.maximal_patches(m, X, "features.0", 0, 3), "count must be between 1 and the 2 images"),
        (lambda m: visualize.draw_activation_maps(X[0], X, "x"), r"maps must be \[channels, height, width\], got \[2,"),
        (lambda m: visualize.occlusion(m, X, Y, 9), r"size must be between 1 and that of images \[2, 1, 8, 8\], got 9"),
        (lambda m: visualize.occlusion(m, X, Y, 2, 3), "stride must be between 1 and size, 2, got 3"),
        (lambda m: visualize.shapley_values(m, X, Y, 3), "patch_size must divide images of 8 x 8, got 3"),
        (lambda m: visualize.shapley_values(m, X, Y, 1), "at most 16 patches, but patch_size=1 makes 64; give permu"),
        (lambda m: visualize.shapley_values(m, X, Y, 4, 0), "permutations must be positive, got 0"),
        (lambda m: visualize.class_images(m, Y, (1, 8, 8), decay=1.0), "decay is out of range: 1.0"),
        (lambda m: visualize.class_images(m, Y + 4, (1, 8, 8)), r"classes must be in \[0, 5\), got \[4, 5\]"),
        (lambda m: visualize.first_layer_filters(m.classifier), r"image_shape must be .* 128 pixels in all, got None"),
        (lambda m: visualize.first_layer_filters(torch.nn.ReLU()), "model must have a convolution or a linear layer"),
        (lambda m: visualize.last_features(m.features, X), "model must call a torch.nn.Linear, Sequential does not"),
        (lambda m: visualize.pca(torch.ones(5, 3), 4), r"dimensions must be between 1 and 3, .* got 4"),
        (
            lambda m: visualize.tsne(torch.ones(5, 3)),
            "perplexity must be positive and less than the 5 features, got 30",
        ),
        (lambda m: visualize.tsne(torch.ones(5, 1), 2), r"features must be \[N, D\] with D at least 2, got \[5, 1\]"),
        (lambda m: visualize.nearest_neighbours(X, X, 3), "count must be between 1 and the 2 features, got 3"),
        (lambda m: visualize.nearest_neighbours(X[:, :, 1:], X, 1), r"queries must be shaped as features, \[1, 8, 8\]"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_expected(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(models.LeNet(8, 1, CLASSES))


def test_a_layer_that_is_not_called_in_evaluation_is_named() -> None:
    build, shape = CLASSIFIERS["googlenet"]
    with pytest.raises(
        ValueError, match=r"layer must return a tensor in evaluation mode, but 'aux1.fc1' was not called"
    ):
        visualize.activation_maps(build(nn), random_images(shape), "aux1.fc1")


def test_tokens_have_no_patches() -> None:
    build, shape = CLASSIFIERS["vision_transformer"]
    with pytest.raises(ValueError, match=r"layer must return \[N, channels, h, w\] .* returned \[2, 17, 16\]"):
        visualize.maximal_patches(build(nn), random_images(shape), "encoder.ln", 0, 1)
