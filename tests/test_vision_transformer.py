"""The Vision Transformer: as on torch's layers and as torchvision's, its sizes, and what it learns of digits."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch

from dlkernels import data, models, nn
from dlkernels.models import vision_transformer

from .cases.learning import accuracy, fit
from .cases.networks import compare_with_torch
from .cases.reference import import_torchvision


def tiny(layers: ModuleType = nn, **arguments: Any) -> models.VisionTransformer:
    """Two blocks of two heads over patches of 4 x 4."""
    return models.VisionTransformer(12, 4, 2, 2, 16, 24, num_classes=5, layers=layers, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"representation_size": 7}], ids=["plain", "representation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_it_computes_on_torchs_layers(dtype: torch.dtype, arguments: dict[str, int]) -> None:
    x = torch.randn(3, 3, 12, 12, dtype=dtype)
    compare_with_torch(lambda layers: tiny(layers, **arguments), lambda model: model(x), dtype)


@pytest.mark.parametrize("argument", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(argument: str) -> None:
    model = tiny(**{argument: 0.5})
    torch.nn.init.normal_(model.heads.head.weight)
    x = torch.randn(3, 3, 12, 12)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_b_16", 86_567_656),
        ("vit_b_32", 88_224_232),
        ("vit_l_16", 304_326_632),
        ("vit_l_32", 306_535_400),
        ("vit_h_14", 632_045_800),
    ],
)
def test_parameter_counts_are_torchvisions(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.get_model(name)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_names_and_shapes_are_torchvisions() -> None:
    model = models.VisionTransformer(12, 4, 1, 2, 16, 24, num_classes=5, representation_size=7)
    block = "encoder.layers.encoder_layer_0."
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "class_token": (1, 1, 16),
        "conv_proj.weight": (16, 3, 4, 4),
        "conv_proj.bias": (16,),
        "encoder.pos_embedding": (1, 10, 16),
        block + "ln_1.weight": (16,),
        block + "ln_1.bias": (16,),
        block + "self_attention.in_proj_weight": (48, 16),
        block + "self_attention.in_proj_bias": (48,),
        block + "self_attention.out_proj.weight": (16, 16),
        block + "self_attention.out_proj.bias": (16,),
        block + "ln_2.weight": (16,),
        block + "ln_2.bias": (16,),
        block + "mlp.0.weight": (24, 16),
        block + "mlp.0.bias": (24,),
        block + "mlp.3.weight": (16, 24),
        block + "mlp.3.bias": (16,),
        "encoder.ln.weight": (16,),
        "encoder.ln.bias": (16,),
        "heads.pre_logits.weight": (7, 16),
        "heads.pre_logits.bias": (7,),
        "heads.head.weight": (5, 7),
        "heads.head.bias": (5,),
    }


@pytest.mark.parametrize("representation_size", [None, 7])
def test_it_starts_and_computes_as_torchvisions(representation_size: int | None) -> None:
    torchvision = import_torchvision()
    networks = []
    for network in (torchvision.models.VisionTransformer, models.VisionTransformer):
        torch.manual_seed(0)
        networks.append(network(12, 4, 2, 2, 16, 24, num_classes=5, representation_size=representation_size))
    theirs, ours = networks
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    torch.nn.init.normal_(theirs.heads.head.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_block_is_torchs_encoder_layer_that_normalises_first() -> None:
    block = vision_transformer.EncoderBlock(2, 16, 24, 0.0, 0.0, vision_transformer.layer_norm, nn).double()
    layer = torch.nn.TransformerEncoderLayer(
        16, 2, 24, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True, dtype=torch.float64
    )
    for ours, theirs in (
        (block.ln_1, layer.norm1),
        (block.self_attention, layer.self_attn),
        (block.ln_2, layer.norm2),
        (block.mlp[0], layer.linear1),
        (block.mlp[3], layer.linear2),
    ):
        ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 10, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x), rtol=0, atol=1e-12)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, 5, got 12"):
        models.VisionTransformer(12, 5, 1, 2, 16, 24)
    with pytest.raises(ValueError, match="hidden_dim must be a multiple of num_heads, 3, got 16"):
        models.VisionTransformer(12, 4, 1, 3, 16, 24)
    with pytest.raises(ValueError, match=r"x must be images of 12 x 12, got \[2, 3, 12, 8\]"):
        tiny()(torch.randn(2, 3, 12, 8))


def test_it_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    model = models.VisionTransformer(8, 2, 2, 4, 48, 96, num_classes=10)
    loss = nn.CrossEntropyLoss()

    def in_colour(images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 3, -1, -1)

    losses = fit(
        model.parameters(),
        lambda images, labels: loss(model(in_colour(images)), labels),
        digits.train_images,
        digits.train_labels,
        epochs=20,
        learning_rate=3e-3,
    )
    assert losses[0] == pytest.approx(math.log(10), rel=1e-6)
    assert accuracy(model, in_colour(digits.test_images), digits.test_labels) >= 0.93
