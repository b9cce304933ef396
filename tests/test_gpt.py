"""GPT: GPT-2's size, its weights by Hugging Face's names, its initial values; it learns a sequence by heart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dlkernels import models
from dlkernels.models import decoding
from dlkernels.models.gpt import gpt2_state_dict

from .cases.sequences import fit

VOCABULARY, POSITIONS, FEATURES, HEADS, LAYERS = 17, 10, 12, 3, 2


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


def test_gpt2_small_has_its_parameters() -> None:
    with torch.device("meta"):
        model = models.gpt2_small()
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.output.weight is model.embedding.weight
    assert len(model.blocks) == 12
    assert model.blocks[0].attention.nhead == 12


def hugging_face_weights() -> dict[str, Tensor]:
    """Weights by the names and in the shapes of a checkpoint of ``GPT2LMHeadModel``."""
    shapes = {"wte.weight": (VOCABULARY, FEATURES), "wpe.weight": (POSITIONS, FEATURES)}
    for layer in range(LAYERS):
        block = {"attn.c_attn": 3 * FEATURES, "attn.c_proj": FEATURES, "mlp.c_fc": 4 * FEATURES, "mlp.c_proj": FEATURES}
        for name, out_features in block.items():
            in_features = 4 * FEATURES if name == "mlp.c_proj" else FEATURES
            shapes[f"h.{layer}.{name}.weight"] = (in_features, out_features)
            shapes[f"h.{layer}.{name}.bias"] = (out_features,)
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (FEATURES,), f"h.{layer}.{name}.bias": (FEATURES,)}
    shapes |= {"ln_f.weight": (FEATURES,), "ln_f.bias": (FEATURES,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def gpt2(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """GPT-2's logits, written out."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (FEATURES,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    length = tokens.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:length]
    for layer in range(LAYERS):
        heads = linear(f"h.{layer}.attn.c_attn", norm(f"h.{layer}.ln_1", x)).chunk(3, -1)
        query, key, value = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in heads)
        scores = query @ key.transpose(2, 3) / math.sqrt(FEATURES / HEADS)
        attended = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
        x = x + linear(f"h.{layer}.attn.c_proj", attended.transpose(1, 2).flatten(2))
        y = linear(f"h.{layer}.mlp.c_fc", norm(f"h.{layer}.ln_2", x))
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(f"h.{layer}.mlp.c_proj", y)
    return norm("ln_f", x) @ weights["wte.weight"].T


@pytest.mark.parametrize("form", ["GPT2LMHeadModel", "GPT2Model", "with buffers"])
def test_weights_by_hugging_faces_names(form: str) -> None:
    weights = hugging_face_weights()
    tokens = torch.randint(VOCABULARY, (2, POSITIONS))
    expected = gpt2(weights, tokens)
    state = weights
    if form == "GPT2LMHeadModel":
        state = {f"transformer.{name}": tensor for name, tensor in weights.items()}
        state["lm_head.weight"] = weights["wte.weight"]
    if form == "with buffers":
        for layer in range(LAYERS):
            state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
            state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    model = models.GPT(VOCABULARY, POSITIONS, FEATURES, HEADS, LAYERS, dropout=0.0).double()
    models.load_weights(model, gpt2_state_dict(state))
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-9)


def test_initial_weights_are_gpt2s() -> None:
    model = models.GPT(100, 100, 64, 4, 8)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            residual = "attention.output" in name or "feed_forward.output" in name
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.06), name
    tokens = torch.randint(100, (4, 100))
    assert model.eval().loss(tokens, tokens.roll(1)).item() == pytest.approx(math.log(100), abs=0.1)


def test_it_learns_a_sequence_by_heart() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(9, (1, 120))
    model = models.GPT(9, 120, 32, 2, 1, dropout=0.0)
    fit(model, lambda: (tokens[:, :-1], tokens[:, 1:]), steps=200)
    assert torch.equal(decoding.greedy(model, prompt=tokens[:, :1], max_length=120), tokens)


def test_dropout_acts_in_training_alone() -> None:
    model = models.GPT(VOCABULARY, POSITIONS, FEATURES, HEADS, LAYERS, dropout=0.5)
    tokens = torch.randint(VOCABULARY, (2, POSITIONS))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_dropout_of_attention_acts() -> None:
    model = models.GPT(VOCABULARY, POSITIONS, FEATURES, HEADS, LAYERS, dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tokens = torch.randint(VOCABULARY, (2, POSITIONS))
    assert not torch.equal(model(tokens), model(tokens))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="nhead must divide d_model, 12, got 5"):
        models.GPT(VOCABULARY, POSITIONS, FEATURES, 5, LAYERS)
