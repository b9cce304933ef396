"""MLP-Mixer: as on torch's layers and as timm's, its sizes, and what it learns of digits."""

from __future__ import annotations

import math

import pytest
import torch

from dlkernels import data, models, nn
from dlkernels.models import mlp_mixer

from .cases.learning import accuracy, fit
from .cases.networks import compare_with_torch
from .cases.reference import import_torchvision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_it_computes_on_torchs_layers(dtype: torch.dtype) -> None:
    x = torch.randn(3, 3, 12, 12, dtype=dtype)
    compare_with_torch(
        lambda layers: models.MLPMixer(12, 4, 2, 16, 8, 24, num_classes=5, layers=layers), lambda model: model(x), dtype
    )


@pytest.mark.parametrize(
    ("name", "parameters"), [("mixer_s_16", 18_528_264), ("mixer_b_16", 59_880_472), ("mixer_l_16", 208_196_168)]
)
def test_parameter_counts_are_timms(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = models.get_model(name)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)


def test_names_and_shapes_are_timms() -> None:
    model = models.MLPMixer(12, 4, 1, 16, 8, 24, num_classes=5)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == {
        "stem.proj.weight": (16, 3, 4, 4),
        "stem.proj.bias": (16,),
        "blocks.0.norm1.weight": (16,),
        "blocks.0.norm1.bias": (16,),
        "blocks.0.mlp_tokens.fc1.weight": (8, 9),
        "blocks.0.mlp_tokens.fc1.bias": (8,),
        "blocks.0.mlp_tokens.fc2.weight": (9, 8),
        "blocks.0.mlp_tokens.fc2.bias": (9,),
        "blocks.0.norm2.weight": (16,),
        "blocks.0.norm2.bias": (16,),
        "blocks.0.mlp_channels.fc1.weight": (24, 16),
        "blocks.0.mlp_channels.fc1.bias": (24,),
        "blocks.0.mlp_channels.fc2.weight": (16, 24),
        "blocks.0.mlp_channels.fc2.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }


def test_it_computes_as_timms() -> None:
    import_torchvision()  # which timm needs
    mixers = pytest.importorskip("timm.models.mlp_mixer", reason="pip install --no-deps timm==1.0.31")
    theirs = mixers.MlpMixer(num_classes=5, img_size=12, patch_size=4, num_blocks=2, embed_dim=16)
    ours = models.MLPMixer(12, 4, 2, 16, 8, 64, num_classes=5)
    torch.nn.init.normal_(theirs.head.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, 3, 12, 12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_block_adds_to_what_it_gets() -> None:
    block = mlp_mixer.MixerBlock(9, 16, 8, 24, nn)
    for linear in (block.mlp_tokens.fc2, block.mlp_channels.fc2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    x = torch.randn(3, 9, 16)
    assert torch.equal(block(x), x)


def test_tokens_meet_in_one_mlp_and_channels_in_the_other() -> None:
    """Without the first MLP, an output token depends on its own input token alone; without the second and norms, an
    output channel on its own input channel alone."""
    block = mlp_mixer.MixerBlock(4, 6, 8, 24, nn).double()
    block.norm1 = block.norm2 = torch.nn.Identity()
    x = torch.randn(1, 4, 6, dtype=torch.float64)

    def depends(removed: torch.nn.Linear) -> torch.Tensor:
        saved = removed.weight.detach().clone()
        torch.nn.init.zeros_(removed.weight)
        jacobian = torch.autograd.functional.jacobian(block, x)  # [1, 4, 6, 1, 4, 6]
        removed.weight.data.copy_(saved)
        return jacobian[0, :, :, 0] != 0  # [token out, channel out, token in, channel in]

    tokens, channels = depends(block.mlp_tokens.fc2), depends(block.mlp_channels.fc2)
    assert torch.equal(tokens.any(1).any(-1), torch.eye(4, dtype=torch.bool))
    assert channels.any(1).any(-1).all()
    assert torch.equal(channels.any(2).any(0), torch.eye(6, dtype=torch.bool))
    assert tokens.any(2).any(0).all()


def test_initial_values_have_the_variance_of_lecun() -> None:
    weight = torch.empty(400, 100)
    mlp_mixer.lecun_normal_(weight)
    assert weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert weight.abs().max() <= 2 * 0.1 / 0.8796


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, 5, got 12"):
        models.MLPMixer(12, 5, 1, 16, 8, 24)
    with pytest.raises(ValueError, match=r"x must be images of 12 x 12, got \[2, 3, 12, 8\]"):
        models.MLPMixer(12, 4, 1, 16, 8, 24)(torch.randn(2, 3, 12, 8))


def test_it_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.load_digits(0)
    model = models.MLPMixer(8, 2, 2, 32, 32, 64, num_classes=10)
    loss = nn.CrossEntropyLoss()

    def in_colour(images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 3, -1, -1)

    losses = fit(
        model.parameters(),
        lambda images, labels: loss(model(in_colour(images)), labels),
        digits.train_images,
        digits.train_labels,
        epochs=12,
        learning_rate=3e-3,
    )
    assert losses[0] == pytest.approx(math.log(10), rel=1e-6)
    assert accuracy(model, in_colour(digits.test_images), digits.test_labels) >= 0.93
