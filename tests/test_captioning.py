"""Captioning: fifty captions learned by heart, with attention and without, and an encoder of one's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from dlkernels import models
from dlkernels.models import decoding

from .cases.sequences import COLOURS, END, PLACES, SHAPES, START, WORDS, encoded, fit, padded, picture

BUILDERS = {
    "without attention": lambda **arguments: models.Captioner(
        len(WORDS), embedding_size=16, hidden_size=64, **arguments
    ),
    "with attention": lambda **arguments: models.Captioner(
        len(WORDS), embedding_size=16, hidden_size=64, attention=True, **arguments
    ),
    "transformer": lambda **arguments: models.CaptioningTransformer(
        len(WORDS), d_model=32, nhead=4, num_layers=1, dim_feedforward=64, dropout=0.0, **arguments
    ),
}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=BUILDERS)
def build(request: pytest.FixtureRequest) -> Callable[..., torch.nn.Module]:
    return BUILDERS[request.param]


def test_fifty_captions_are_learned_by_heart(build: Callable[..., torch.nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    everything = list(itertools.product(COLOURS, SHAPES, PLACES))
    chosen = [everything[i] for i in torch.randperm(len(everything), generator=generator)[:50]]
    images = torch.stack([picture(*attributes, generator) for attributes in chosen])
    captions = padded([[START, *encoded(f"a {colour} {shape} at the {place}"), END] for colour, shape, place in chosen])
    torch.manual_seed(0)
    model = build(encoder_channels=32)
    fit(model, lambda: (images, captions), steps=400)
    for found in (
        decoding.greedy(model, images, max_length=12),
        decoding.beam_search(model, images, max_length=12, beams=3)[0],
    ):
        assert torch.equal(found, captions)


def test_any_module_that_gives_a_grid_encodes(build: Callable[..., torch.nn.Module]) -> None:
    encoder = torch.nn.Conv2d(1, 5, 4, stride=4)  # patches of grey images
    model = build(encoder=encoder, encoder_channels=5)
    images, inputs = torch.randn(2, 1, 8, 12), torch.tensor([[START, 5, 6], [START, 7, 8]])
    assert model.encoder is encoder
    assert model(images, inputs).shape == (2, 3, len(WORDS))
    model.loss(images, inputs).backward()
    assert encoder.weight.grad.abs().sum() > 0


def test_attention_looks_at_every_place_and_the_mean_at_none() -> None:
    # Without attention only the mean of the features counts: exchanging places changes nothing.
    images, inputs = torch.randn(2, 6, 2, 3), torch.tensor([[START, 5, 6], [START, 7, 8]])
    exchanged = images.flip(-1)
    outputs = {}
    for name, build in BUILDERS.items():
        torch.manual_seed(0)
        model = build(encoder=torch.nn.Identity(), encoder_channels=6).eval()
        outputs[name] = (model(images, inputs) - model(exchanged, inputs)).abs().max().item()
    assert outputs["without attention"] < 1e-6
    assert outputs["with attention"] < 1e-6  # a sum over places too, in any order
    assert outputs["transformer"] > 1e-3  # knows where each place is
