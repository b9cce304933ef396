"""Contrastive learning: losses as written out, what gradients reach, queue and momentum, collapse, what is learnt."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dlkernels import nn, ssl
from dlkernels.ssl import momentum

from .cases.self_supervision import FEATURES, Constant, Outputs, conv_encoder, linear_encoder, pretrain, probe, warped
from .cases.sequences import COLOURS, END, PLACES, SHAPES, WORDS, encoded, fit, padded, picture


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


def assert_same_loss_and_gradients(
    loss: Callable[..., Tensor], written_out: Callable[..., Tensor], *arguments: Tensor
) -> None:
    """In float64, of all arguments."""
    results = []
    for function in (loss, written_out):
        leaves = [x.detach().clone().requires_grad_() for x in arguments]
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def written_out_info_nce(queries: Tensor, keys: Tensor, temperature: Tensor) -> Tensor:
    total = torch.zeros((), dtype=queries.dtype)
    for i in range(len(queries)):
        scores = [(queries[i] * keys[j]).sum() / temperature for j in range(len(keys))]
        total = total - (scores[i].exp() / sum(score.exp() for score in scores)).log()
    return total / len(queries)


def written_out_nt_xent(first: Tensor, second: Tensor, temperature: float = 0.3) -> Tensor:
    views = [view / view.norm() for view in (*first, *second)]
    count = len(first)
    total = torch.zeros((), dtype=first.dtype)
    for i, view in enumerate(views):
        partner = (i + count) % (2 * count)
        others = [((view * views[k]).sum() / temperature).exp() for k in range(2 * count) if k != i]
        total = total + sum(others).log() - (view * views[partner]).sum() / temperature
    return total / (2 * count)


def test_info_nce_is_the_loss_written_out() -> None:
    queries, keys = torch.randn(2, 6, 5, dtype=torch.float64)
    temperature = torch.tensor(0.4, dtype=torch.float64)
    assert_same_loss_and_gradients(ssl.info_nce, written_out_info_nce, queries, keys, temperature)


def test_nt_xent_is_the_loss_written_out() -> None:
    first, second = torch.randn(2, 6, 5, dtype=torch.float64)
    assert_same_loss_and_gradients(lambda *views: ssl.nt_xent(*views, 0.3), written_out_nt_xent, first, second)


def test_nt_xent_does_not_care_for_order_or_length() -> None:
    first, second = torch.randn(2, 6, 5, dtype=torch.float64)
    loss = ssl.nt_xent(first, second)
    order = torch.randperm(6)
    torch.testing.assert_close(ssl.nt_xent(second[order], 3 * first[order]), loss)
    assert ssl.nt_xent(first, second[order.roll(1)]) != loss


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_losses_of_what_is_told_apart_best(temperature: float) -> None:
    """Both views equal, and those of different images at right angles."""
    views = torch.eye(4, dtype=torch.float64)
    score = math.exp(1 / temperature)
    assert ssl.info_nce(views, views, temperature).item() == pytest.approx(-math.log(score / (score + 3)))
    assert ssl.nt_xent(views, views, temperature).item() == pytest.approx(-math.log(score / (score + 6)))


def test_losses_at_collapse_are_logarithms_of_the_number_of_choices() -> None:
    images = torch.randn(6, 1, 3, 4)
    simclr = ssl.SimCLR(Constant(5), 5, torch.nn.Identity())
    assert simclr.loss(images).item() == pytest.approx(math.log(2 * 6 - 1))

    moco = ssl.moco_v2(Constant(5), 5, torch.nn.Identity(), 8, queue_size=20)
    for _ in range(4):
        moco.loss(images)
        moco.update()
    assert moco.loss(images).item() == pytest.approx(math.log(20 + 1))

    clip = ssl.CLIP(Constant(5), 5, Constant(7), 7, 4)
    assert clip.loss(images, torch.zeros(6, 3)).item() == pytest.approx(math.log(6))

    cpc = ssl.CPC(Constant(5), 5, 8, steps=2)
    for predict in cpc.predictions:
        torch.nn.init.zeros_(predict.weight)
    mean = (math.log(6 * 9) + math.log(6 * 8)) / 2
    assert cpc.loss(torch.randn(6, 10, 3)).item() == pytest.approx(mean)


def test_no_more_than_one_block_of_logits_is_built() -> None:
    """The largest results of the operators, forward and backward; the kernels' own are of a fixed size."""
    first, second = torch.randn(2, 300, 4).requires_grad_()
    with Outputs() as outputs:
        ssl.info_nce(first, second).backward()
    assert outputs.blocks(300 * 300) == 0

    with Outputs() as outputs:
        loss = ssl.nt_xent(first, second)
    assert outputs.blocks(600 * 600) == 1
    with Outputs() as outputs:
        loss.backward()
    assert outputs.blocks(600 * 600) == 1  # their gradient

    moco = ssl.moco_v1(linear_encoder(5), 5, torch.nn.Identity(), 8, queue_size=1000)
    with Outputs() as outputs:
        moco.loss(torch.randn(300, 1, 3, 4)).backward()
    assert outputs.blocks(300 * 1000) == 0


def test_simclr_contrasts_two_views_of_each_image() -> None:
    seen: list[Tensor] = []

    def augment(images: Tensor) -> Tensor:
        seen.append(images + 0.1 * torch.randn_like(images))
        return seen[-1]

    model = ssl.SimCLR(linear_encoder(6), 6, augment, 8, 0.2)
    loss = model.loss(torch.randn(5, 1, 3, 4))
    assert len(seen) == 2
    torch.testing.assert_close(loss, ssl.nt_xent(model(seen[0]), model(seen[1]), 0.2))


@pytest.mark.parametrize("channels", [1, 3])
def test_random_views_are_drawn_for_each_image_by_itself(channels: int) -> None:
    pytest.importorskip("kornia")
    view = ssl.random_view(12, strength=1.0 if channels == 3 else 0.0)
    images = torch.rand(1, channels, 16, 16).expand(8, -1, -1, -1)
    torch.manual_seed(1)
    first, second = view(images), view(images)
    assert first.shape == (8, channels, 12, 12)
    assert 0 <= first.min() <= first.max() <= 1 + 1e-6
    views = torch.cat([first, second]).flatten(1)
    assert (torch.cdist(views, views) + torch.eye(16) > 1e-2).all()
    torch.manual_seed(1)
    assert torch.equal(view(images), first)


def test_a_view_of_all_of_an_image_without_anything_else_is_the_image() -> None:
    pytest.importorskip("kornia")
    images = torch.randn(3, 1, 8, 8)
    view = ssl.random_view(8, (1.0, 1.0), strength=0.0, flip=0.0, blur=0.0)
    assert view(images).shape == images.shape
    flipped = ssl.random_view(8, (1.0, 1.0), strength=0.0, flip=1.0, blur=0.0)
    torch.manual_seed(0)
    expected = view(images).flip(3)
    torch.manual_seed(0)
    torch.testing.assert_close(flipped(images), expected)


def moco(queue_size: int = 7, momentum: float = 0.75, head: bool = False) -> ssl.MoCo:
    build = ssl.moco_v2 if head else ssl.moco_v1
    model = build(linear_encoder(6), 6, torch.nn.Identity(), 4, queue_size, momentum)
    with torch.no_grad():  # so that the key encoder is another one
        for parameter in (*model.encoder.parameters(), *model.head.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("head", [False, True])
def test_moco_has_the_loss_and_gradients_written_out(head: bool) -> None:
    model = moco(head=head).double()
    images = torch.randn(5, 1, 3, 4, dtype=torch.float64)
    parameters = [*model.encoder.parameters(), *model.head.parameters()]

    queries = normalize(model.head(model.encoder(images)), dim=1)
    keys = normalize(model.key_head(model.key_encoder(images)), dim=1).detach()
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ model.queue.T], 1) / model.temperature
    expected = -torch.log_softmax(logits, 1)[:, 0].mean()

    loss = model.loss(images)
    torch.testing.assert_close(loss, expected)
    gradients, written_out = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for actual, other in zip(gradients, written_out, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-9, atol=1e-12)


def test_versions_of_moco() -> None:
    first, second = (build(linear_encoder(6), 6, torch.nn.Identity(), 4, 8) for build in (ssl.moco_v1, ssl.moco_v2))
    assert isinstance(first.head, nn.Linear)
    assert [type(layer) for layer in second.head] == [nn.Linear, torch.nn.ReLU, nn.Linear]
    assert (first.temperature, second.temperature) == (0.07, 0.2)


def test_no_gradient_reaches_keys() -> None:
    model = moco()
    model.loss(torch.randn(5, 1, 3, 4)).backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    for network in (model.key_encoder, model.key_head):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    assert not model.queue.requires_grad
    assert not model.keys(torch.randn(5, 1, 3, 4, requires_grad=True)).requires_grad


def test_the_queue_is_first_in_first_out() -> None:
    """Batches that do not divide it, one larger than all of it, several between two updates, none in evaluation."""
    model = moco(queue_size=7, momentum=1.0)
    model.queue.zero_()
    everything = list(model.queue)
    for batches in ((3,), (3,), (3,), (2, 1), (1,), (10,), (5,)):
        for count in batches:
            images = torch.randn(count, 1, 3, 4)
            model.loss(images)
            everything += list(model.keys(images))
        with torch.no_grad():
            model.eval().loss(torch.randn(4, 1, 3, 4))
        model.train().update()
        torch.testing.assert_close(
            model.queue.roll(-int(model.oldest), 0), torch.stack(everything[-7:]), rtol=0, atol=0
        )


def test_the_key_encoder_is_an_exact_moving_average() -> None:
    """With parameters and a momentum that are sums of few powers of two nothing is rounded."""
    model = moco(momentum=0.75)
    for network in (model.encoder, model.key_encoder, model.head, model.key_head):
        for parameter in network.parameters():
            parameter.data = torch.randint(-64, 64, parameter.shape).float()
    fast = [*model.encoder.parameters(), *model.head.parameters()]
    slow = [*model.key_encoder.parameters(), *model.key_head.parameters()]
    expected = [parameter.clone() for parameter in slow]
    for _ in range(3):
        with torch.no_grad():
            for parameter in fast:
                parameter.add_(torch.randint(-8, 8, parameter.shape))
        model.update()
        expected = [0.75 * old + 0.25 * new for old, new in zip(expected, fast, strict=True)]
        for actual, other in zip(slow, expected, strict=True):
            assert torch.equal(actual, other)


@pytest.mark.parametrize(("share", "same"), [(0.0, "fast"), (1.0, "slow")])
def test_momentum_of_zero_and_one(share: float, same: str) -> None:
    fast, slow = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    torch.nn.init.normal_(fast.weight)
    fast(torch.randn(9, 3))
    expected = {"fast": fast.weight, "slow": slow.weight}[same].clone()
    momentum.follow(slow, fast, share)
    assert torch.equal(slow.weight, expected)
    assert torch.equal(slow.running_mean, torch.zeros(3))  # of what it has seen itself: nothing


def test_a_queue_is_part_of_the_state() -> None:
    first, second = moco(), moco()
    first.loss(torch.randn(5, 1, 3, 4))
    first.update()
    second.load_state_dict(first.state_dict())
    images = torch.randn(5, 1, 3, 4)
    for model in (first, second):
        model.loss(images)
        model.update()
    assert int(second.oldest) == 10 % 7
    assert torch.equal(first.queue, second.queue)


def test_cpc_predicts_each_step_from_the_context_before() -> None:
    model = ssl.CPC(nn.Linear(3, 4), 4, 5, steps=2).double()
    sequences = torch.randn(2, 5, 3, dtype=torch.float64)
    encoded_parts, context = model.encoder(sequences), model(sequences)
    total = torch.zeros((), dtype=torch.float64)
    for step in (1, 2):
        for n in range(2):
            for t in range(5 - step):
                predicted = model.predictions[step - 1].weight @ context[n, t]
                scores = encoded_parts[:, step:].flatten(0, 1) @ predicted
                own = encoded_parts[n, t + step] @ predicted
                total = total + (scores.logsumexp(0) - own) / (2 * (5 - step)) / 2
    torch.testing.assert_close(model.loss(sequences), total)


def test_context_of_cpc_knows_nothing_of_what_follows() -> None:
    model = ssl.CPC(nn.Linear(3, 4), 4, 5)
    sequences = torch.randn(2, 6, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(sequences)[:, 2].sum(), sequences)
    assert torch.equal(gradient[:, 3:], torch.zeros(2, 3, 3))
    assert (gradient[:, :3] != 0).all()


def test_clip_is_symmetric_cross_entropy_over_cosines() -> None:
    model = ssl.CLIP(linear_encoder(6), 6, nn.Linear(4, 5), 5, 8).double()
    images, texts = torch.randn(5, 1, 3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    image = normalize(model.image_encoder(images) @ model.image_projection.weight.T, dim=1)
    text = normalize(model.text_encoder(texts) @ model.text_projection.weight.T, dim=1)
    logits = model.log_scale.exp() * image @ text.T
    torch.testing.assert_close(model(images, texts), logits)
    expected = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    loss = model.loss(images, texts)
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    gradients, written_out = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for actual, other in zip(gradients, written_out, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-9, atol=1e-12)
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_the_scale_of_clip_does_not_pass_100() -> None:
    model = ssl.CLIP(linear_encoder(6), 6, nn.Linear(4, 5), 5, 8)
    for log_scale, expected in ((7.0, 100.0), (1.0, math.e)):
        torch.nn.init.constant_(model.log_scale, log_scale)
        model.update()
        assert model.log_scale.exp().item() == pytest.approx(expected)


def test_a_text_is_what_its_end_symbol_has_seen() -> None:
    encoder = ssl.TextEncoder(len(WORDS), 8, 16, 2, 2, end_index=END).double().eval()
    text = [*encoded("red ring"), END]
    alone = encoder(torch.tensor([text]))
    with_padding = encoder(torch.tensor([[*text, END, 0, 0], [*encoded("at the top left"), END, 0]]))
    torch.testing.assert_close(with_padding[:1], alone)
    assert not torch.allclose(encoder(torch.tensor([[*encoded("blue ring"), END]])), alone)
    with pytest.raises(ValueError, match="every text must have the end symbol, 2; one has not"):
        encoder(torch.tensor([text, [3, 3, 3]]))


def test_what_cannot_be_contrasted_is_refused() -> None:
    one, two = torch.randn(1, 3), torch.randn(2, 3)
    with pytest.raises(ValueError, match="contrasting needs at least two rows, got 1"):
        ssl.info_nce(one, one)
    with pytest.raises(ValueError, match="contrasting needs at least two images, got 1"):
        ssl.SimCLR(linear_encoder(6), 6, torch.nn.Identity()).loss(torch.randn(1, 1, 3, 4))
    with pytest.raises(ValueError, match="contrasting needs at least two rows, got 1"):
        ssl.CLIP(linear_encoder(6), 6, nn.Linear(4, 5), 5, 8).loss(torch.randn(1, 1, 3, 4), torch.randn(1, 4))
    for loss in (ssl.info_nce, ssl.nt_xent):
        with pytest.raises(ValueError, match=r"must both be \[N, D\], got \[1, 3\] and \[2, 3\]"):
            loss(one, two)
        with pytest.raises(ValueError, match="temperature must be positive, got 0"):
            loss(two, two, 0)
    with pytest.raises(ValueError, match="sequences must have more than 4 parts, as many as steps, got 4"):
        ssl.CPC(nn.Linear(3, 4), 4, 5).loss(torch.randn(2, 4, 3))
    for arguments, message in (
        ({"queue_size": 0}, "queue_size must be positive, got 0"),
        ({"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ssl.moco_v2(linear_encoder(6), 6, torch.nn.Identity(), **arguments)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        ssl.SimCLR(linear_encoder(6), 6, torch.nn.Identity(), temperature=0.0)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        ssl.CPC(nn.Linear(3, 4), 4, steps=0)


METHODS = {
    "simclr": lambda encoder: ssl.SimCLR(encoder, FEATURES, warped, 32, 0.2),
    "moco_v1": lambda encoder: ssl.moco_v1(encoder, FEATURES, warped, 32, 512, 0.99),
    "moco_v2": lambda encoder: ssl.moco_v2(encoder, FEATURES, warped, 32, 512, 0.99, 0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_probe_of_what_was_learnt_beats_a_random_encoder(method: str) -> None:
    encoder = conv_encoder()
    before = probe(encoder)
    model = METHODS[method](encoder)
    pretrain(model.loss, model.parameters(), 6, update=getattr(model, "update", lambda: None))
    assert probe(encoder) >= before + 0.02


def test_cpc_learns_to_tell_what_follows_in_digits() -> None:
    """Rows of a digit, from top to bottom; a probe sees the context after the last."""
    model = ssl.CPC(torch.nn.Sequential(nn.Linear(8, 16), torch.nn.ReLU(), nn.Linear(16, 16)), 16, 128, steps=3)

    class LastContext(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images.squeeze(1))[:, -1]

    before = probe(LastContext())
    pretrain(lambda images: model.loss(images.squeeze(1)), model.parameters(), 15)
    assert probe(LastContext()) >= before + 0.02


def test_clip_finds_the_text_of_each_picture_and_the_picture_of_each_text() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = [place for place in PLACES if place != "centre"]  # which overlaps with the others
    things = [(colour, shape, place) for colour in COLOURS for shape in SHAPES for place in corners]  # 48
    texts = padded([[*encoded(f"a {colour} {shape} at the {place}"), END] for colour, shape, place in things])
    sets = [torch.stack([picture(*thing, generator) for thing in things]) for _ in range(9)]
    unseen = sets.pop()

    def batch() -> tuple[Tensor, Tensor]:
        return sets[int(torch.randint(len(sets), (), generator=generator))], texts

    convs = conv_encoder(3, 24)[:3]
    image_encoder = torch.nn.Sequential(*convs, torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    text_encoder = ssl.TextEncoder(len(WORDS), texts.shape[1], 32, 2, 1, end_index=END)
    model = ssl.CLIP(image_encoder, 48 * 4, text_encoder, 32, 32)
    fit(model, batch, steps=200)
    own = torch.arange(len(things))
    with torch.no_grad():
        for images in sets:
            logits = model(images, texts)
            assert torch.equal(logits.argmax(1), own)
            assert torch.equal(logits.argmax(0), own)
        assert (model(unseen, texts).argmax(1) == own).float().mean() >= 0.9
