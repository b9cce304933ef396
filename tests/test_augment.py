"""Mixed examples, averaged predictions, transfer: labels share as pixels do, and what is frozen stays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import data, functional, models, nn
from dlkernels.train import augment, ensemble, transfer

from .cases.classifiers import CLASSES, CLASSIFIERS
from .cases.learning import accuracy, fit

LAYERS = pytest.mark.parametrize("layers", [nn, torch.nn], ids=["dlkernels", "torch"])


def numbered_images(count: int = 6, height: int = 7, width: int = 9) -> Tensor:
    """Image i has the value i in every pixel."""
    return torch.arange(count, dtype=torch.float64).view(-1, 1, 1, 1).repeat(1, 2, height, width)


# ---- Mixup, CutMix, Cutout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_weighs_labels_as_it_weighs_pixels(alpha: float) -> None:
    mixup, images, labels = augment.Mixup(6, alpha), numbered_images(), torch.arange(6)
    mixed_any = False
    for _ in range(20):
        mixed, shares = mixup(images, labels)
        torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
        expected = shares @ torch.arange(6, dtype=torch.float64)  # what pixels are, weighed by the labels' shares
        torch.testing.assert_close(mixed, expected.view(-1, 1, 1, 1).expand_as(images))
        weight = shares.diagonal()[shares.diagonal() < 1]
        torch.testing.assert_close(weight, weight[:1].expand_as(weight))  # one weight for the batch
        mixed_any = mixed_any or 0.01 < shares.diagonal().min() < 0.99
    assert mixed_any


def test_mixups_weight_has_the_distribution_of_the_paper() -> None:
    images, labels = numbered_images(2, 1, 1), torch.arange(2)
    for alpha in (0.2, 2.0):
        mixup = augment.Mixup(2, alpha)
        shares = torch.stack([mixup(images, labels)[1][0, 0] for _ in range(2000)])
        weights = shares[shares < 1]  # where the partner was the other one
        assert len(weights) == pytest.approx(1000, abs=100)
        assert weights.mean().item() == pytest.approx(0.5, abs=0.05)
        assert weights.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_cutmix_shares_labels_as_it_shares_pixels() -> None:
    cutmix, images, labels = augment.CutMix(6), numbered_images(), torch.arange(6)
    areas = set()
    for _ in range(50):
        mixed, shares = cutmix(images, labels)
        for image, share in zip(mixed, shares, strict=True):
            pixels = image[0].flatten().long().bincount(minlength=6) / image[0].numel()
            torch.testing.assert_close(share, pixels.double(), rtol=0, atol=1e-7)
            assert torch.equal(image[0], image[1])  # all channels alike
        replaced = mixed[:, 0] != images[:, 0]
        moved = replaced.flatten(1).any(1)
        if moved.any():
            where = replaced[moved][0]
            assert (replaced[moved] == where).all()  # one rectangle for the batch
            rows, columns = where.any(1), where.any(0)
            assert torch.equal(where, rows[:, None] & columns)
            for line in (rows, columns):
                assert line.long().diff().abs().sum() <= 2  # without gaps
            areas.add(int(where.sum()))
    assert len(areas) > 10


def test_cutmix_keeps_on_average_what_the_beta_distribution_says_before_clipping() -> None:
    images, labels = numbered_images(2, 64, 64), torch.arange(2)
    kept = torch.stack([augment.CutMix(2, 1.0)(images, labels)[1][0, 0] for _ in range(600)])
    kept = kept[kept < 1]
    # A side s of the image's is s - s^2 / 4 after clipping, on average over the centres; s^2 is uniform.
    s = torch.rand(100_000, dtype=torch.float64).sqrt()
    assert kept.mean().item() == pytest.approx(1 - (s - s**2 / 4).square().mean().item(), abs=0.04)


def test_cutout_zeroes_a_square_of_its_size_and_nothing_else() -> None:
    height, width, size = 9, 12, 4
    images, labels = torch.ones(4000, 2, height, width), torch.arange(4000)
    cut, same = augment.Cutout(size)(images, labels)
    assert torch.equal(same, labels)
    assert (images == 1).all()
    hole = cut[:, 0] == 0
    assert torch.equal(hole, cut[:, 1] == 0)
    rows, columns = hole.any(2), hole.any(1)  # [N, H], [N, W]
    assert torch.equal(hole, rows[:, :, None] & columns[:, None])
    areas = hole.flatten(1).sum(1)
    assert areas.max() == size**2
    inside = rows[:, 1:-1].sum(1).eq(size) & columns[:, 1:-1].sum(1).eq(size)
    assert (areas[inside] == size**2).all() and inside.any()
    # The square reaches from two pixels before its centre to one behind: at the border 2, 1 and 1 of its rows are lost.
    expected = (size - (2 + 1 + 1) / height) * (size - (2 + 1 + 1) / width)
    assert areas.float().mean().item() == pytest.approx(expected, rel=0.02)
    assert ((hole.float().mean(0) > 0).all()).item()  # every pixel can be hit


@pytest.mark.parametrize("size", [1, 3, 20])
def test_a_hole_of_any_size_fits(size: int) -> None:
    cut, _ = augment.Cutout(size)(torch.ones(50, 1, 6, 6), torch.zeros(50))
    areas = (cut == 0).flatten(1).sum(1)
    assert (areas == 1).all() if size == 1 else areas.max() == min(size, 6) ** 2


def test_mixed_labels_feed_our_cross_entropy() -> None:
    logits = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    images, labels = numbered_images(), torch.arange(6)
    for mix in (augment.Mixup(6, 1.0), augment.CutMix(6)):
        mixed, shares = mix(*augment.Cutout(3)(images, labels))
        again, shares = augment.Mixup(6)(mixed, shares)  # shares can be mixed once more
        torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
        loss = functional.cross_entropy(logits, shares)
        torch.testing.assert_close(loss, -(shares * logits.log_softmax(1)).sum(1).mean())
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(gradient, (logits.softmax(1) - shares).detach() / 6)
        assert functional.cross_entropy(logits, shares, label_smoothing=0.1).isfinite()
        assert again.shape == images.shape


@pytest.mark.parametrize("name", ["mixup", "cutmix", "cutout"])
def test_augmentation_repeats_with_torchs_seed(name: str) -> None:
    call: Any = {"mixup": augment.Mixup(6), "cutmix": augment.CutMix(6), "cutout": augment.Cutout(3)}[name]
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(call(images, labels)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "cutout"])
def test_a_network_learns_digits_from_mixed_ones(mix: str) -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    call: Any = {"mixup": augment.Mixup(10), "cutmix": augment.CutMix(10), "cutout": augment.Cutout(3)}[mix]
    torch.manual_seed(0)
    model = models.LeNet(8)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        images, labels = call(images, labels)
        return functional.cross_entropy(model(images), labels)

    fit(model.parameters(), loss, digits.train_images, digits.train_labels, epochs=6, learning_rate=3e-3)
    assert accuracy(model, digits.test_images, digits.test_labels) >= 0.96


# ---- Averages --------------------------------------------------------------------------------------------------------


@LAYERS
def test_an_ensemble_has_the_average_of_the_probabilities(layers: ModuleType) -> None:
    build, shape = CLASSIFIERS["lenet"]
    members, x = [build(layers).double().eval() for _ in range(3)], torch.randn(4, *shape, dtype=torch.float64)
    both = ensemble.Ensemble(members).eval()
    expected = torch.stack([member(x).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(both(x).exp(), expected)
    torch.testing.assert_close(functional.cross_entropy(both(x), torch.arange(4)), -expected.diagonal().log().mean())
    assert len(list(both.parameters())) == 3 * len(list(members[0].parameters()))


def test_an_ensemble_of_sure_members_has_finite_logits() -> None:
    members = [torch.nn.Flatten(), torch.nn.Flatten()]
    x = torch.tensor([[[[1e4, -1e4, 0.0]]]])
    assert ensemble.Ensemble(members)(x).isfinite().all()


def test_test_time_augmentation_has_the_average_over_the_views() -> None:
    build, shape = CLASSIFIERS["lenet"]
    model, x = build(nn).double().eval(), torch.randn(4, *shape, dtype=torch.float64)
    views: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x.flip(-1), lambda x: x.roll(1, -2)]
    averaged = ensemble.TestTimeAugmentation(model, views).eval()
    expected = torch.stack([model(x), model(x.flip(-1)), model(x.roll(1, -2))]).softmax(-1).mean(0)
    torch.testing.assert_close(averaged(x).exp(), expected)
    two = ensemble.TestTimeAugmentation(model, views[:2])
    torch.testing.assert_close(two(x), two(x.flip(-1)))  # what the views do makes no difference any more


def test_an_ensemble_is_better_than_its_members() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    members, loss = [], nn.CrossEntropyLoss()
    for seed in range(5):
        torch.manual_seed(seed)
        member, images, labels = models.TwoLayerNet(64, 24), digits.train_images, digits.train_labels
        chosen = torch.randperm(len(labels))[:400]
        call = lambda x, y, member=member: loss(member(x), y)  # noqa: E731
        fit(member.parameters(), call, images[chosen], labels[chosen], epochs=20, learning_rate=1e-2)
        members.append(member)
    alone = [accuracy(member, digits.test_images, digits.test_labels) for member in members]
    assert accuracy(ensemble.Ensemble(members), digits.test_images, digits.test_labels) > max(alone)


# ---- Transfer --------------------------------------------------------------------------------------------------------


@LAYERS
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_takes_on_other_classes_with_a_new_head_alone(name: str, layers: ModuleType) -> None:
    build, shape = CLASSIFIERS[name]
    model: Any = build(layers).train()
    if name == "googlenet":
        model.aux_logits = False
    model(torch.randn(4, *shape))  # batch norm has statistics
    before = {key: value.clone() for key, value in model.state_dict().items()}
    head = transfer.replace_head(model, 3)
    own = {f"{key}.{part}" for key, module in model.named_modules() if module is head for part in ("weight", "bias")}
    assert type(head) is layers.Linear
    modes = [module.training for module in model.modules()]
    with transfer.frozen(model, head):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        logits = model(torch.randn(4, *shape))
        logits.square().sum().backward()
        optimizer.step()
    assert logits.shape == (4, 3)
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - own)
    assert head.weight.grad is not None and head.weight.grad.abs().max() > 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_frozen_norms_normalise_by_their_running_statistics_and_what_was_frozen_before_stays_so() -> None:
    model: Any = CLASSIFIERS["lenet"][0](nn).double()
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    for _ in range(3):
        model(x)
    expected = model.eval()(x)
    model.train()
    model.features[0].conv.weight.requires_grad_(False)
    with transfer.frozen(model, model.classifier):
        torch.testing.assert_close(model(x), expected)
    assert not model.features[0].conv.weight.requires_grad
    assert not torch.allclose(model(x), expected)
    with pytest.raises(RuntimeError), transfer.frozen(model, model.classifier):
        model(x[:, :, :3])
    assert model.features[0].norm.weight.requires_grad and model.features[0].norm.training


def test_norms_of_the_part_that_is_trained_go_on_moving() -> None:
    model: Any = CLASSIFIERS["lenet"][0](nn)
    with transfer.frozen(model, model.features[1]):
        model(torch.randn(8, 1, 8, 8))
    assert model.features[0].norm.num_batches_tracked == 0
    assert model.features[1].norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_discriminative_groups_have_every_parameter_once_and_rates_that_grow_to_the_output(name: str) -> None:
    model: Any = CLASSIFIERS[name][0](nn)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    groups = transfer.discriminative_groups(model, 0.1, decay=0.5)
    found = [parameter for group in groups for parameter in group["params"]]
    assert len(found) == len({id(parameter) for parameter in found})
    assert {id(p) for p in found} == {id(p) for p in model.parameters() if p is not first}
    assert [group["lr"] for group in groups] == [0.1 * 0.5**depth for depth in reversed(range(len(groups)))]
    order = {id(parameter): place for place, parameter in enumerate(model.parameters())}
    assert [order[id(p)] for p in found] == sorted(order[id(p)] for p in found)
    rates = [group["lr"] for group in torch.optim.SGD(groups).param_groups]
    assert rates == sorted(rates)


def test_shared_parameters_are_in_the_first_of_their_groups() -> None:
    shared = nn.Linear(4, 4)
    model = torch.nn.Sequential(shared, torch.nn.Sequential(torch.nn.ReLU(), shared), nn.Linear(4, 2))
    groups = transfer.discriminative_groups(model, 1.0, decay=0.5)
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert groups[0]["params"][0] is shared.weight and groups[0]["lr"] == 0.5


def test_who_knows_the_digits_learns_which_are_odd_from_twenty_examples() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    images, labels = digits.train_images, digits.train_labels
    few = torch.cat([(labels == label).nonzero().flatten()[:2] for label in range(10)])
    loss = nn.CrossEntropyLoss()

    def accuracy_of_a_new_head(pretrained: bool) -> float:
        torch.manual_seed(0)
        model = models.LeNet(8)
        call = lambda x, y: loss(model.train()(x), y)  # noqa: E731
        if pretrained:
            fit(model.parameters(), call, images, labels, epochs=5, learning_rate=3e-3)
        head = transfer.replace_head(model, 2)
        with transfer.frozen(model, head):
            fit(head.parameters(), call, images[few], labels[few] % 2, epochs=100, learning_rate=1e-2, batch_size=20)
        return accuracy(model, digits.test_images, digits.test_labels % 2)

    assert accuracy_of_a_new_head(pretrained=True) >= 0.88
    assert accuracy_of_a_new_head(pretrained=False) <= 0.8


# ---- Bad input -------------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.Mixup(1), "num_classes must be at least 2, got 1"),
        (lambda: augment.CutMix(3, 0.0), "alpha must be positive, got 0.0"),
        (lambda: augment.Cutout(0), "size must be positive, got 0"),
        (lambda: augment.Mixup(4)(X[:1], Y[:1]), "images must be at least two to be mixed, got 1"),
        (lambda: augment.CutMix(4)(X[:1], Y[:1]), "images must be at least two to be mixed, got 1"),
        (lambda: augment.Mixup(4)(X, Y.float()), r"labels must be int64 \[N\] or floating \[N, 4\], got torch.float32"),
        (lambda: augment.Mixup(3)(X, torch.ones(4, 4)), r"labels must be .* floating \[N, 3\], got .* \[4, 4"),
        (lambda: ensemble.Ensemble([]), "models must be at least one, got none"),
        (lambda: ensemble.TestTimeAugmentation(torch.nn.ReLU(), []), "views must be at least one, got none"),
        (lambda: transfer.replace_head(models.LeNet(8), 1), "num_classes must be at least 2, got 1"),
        (lambda: transfer.replace_head(torch.nn.ReLU(), 2), "model must have a linear layer, ReLU has none"),
        (lambda: transfer.frozen(models.LeNet(8), nn.Linear(2, 2)).__enter__(), "except_for must be a part"),
        (lambda: transfer.discriminative_groups(models.LeNet(8), 0.0), "learning_rate must be positive, got 0.0"),
        (lambda: transfer.discriminative_groups(models.LeNet(8), 0.1, -1), "decay must be positive, got -1"),
        (lambda: transfer.discriminative_groups(torch.nn.ReLU(), 0.1), "model must have a parameter with a gradient"),
    ],
)  # fmt: skip
def test_bad_input_is_an_error_that_says_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_head_has_as_many_classes_as_asked_for_and_the_type_of_the_old_one() -> None:
    model: Any = CLASSIFIERS["vgg"][0](nn).to(torch.bfloat16)
    head = transfer.replace_head(model, CLASSES + 1)
    assert model.classifier[1] is head
    assert head.weight.dtype == torch.bfloat16
    assert head.out_features == CLASSES + 1
