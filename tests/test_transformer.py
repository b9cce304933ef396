"""Transformer: torch's weights give torch's outputs and gradients under every mask; it learns to copy and reverse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dlkernels import models, nn
from dlkernels.models import decoding
from dlkernels.models.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

from .cases.networks import TOLERANCES
from .cases.sequences import PADDING, fit, sequence_pairs

FEATURES, HEADS, HIDDEN = 12, 3, 20
N, S, T = 3, 5, 4


pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def precision(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def per_head(queries: int, keys: int) -> Tensor:
    """A mask for each sequence and head, in which every query sees the first key."""
    mask = torch.rand(N * HEADS, queries, keys) < 0.4
    mask[:, :, 0] = False
    return mask


def ends(length: int) -> Tensor:
    """Padding at the ends of sequences, the first of which has none."""
    return torch.arange(length) >= torch.tensor([[length], [length - 2], [1]])


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Hides where ``mask`` is true, and shifts the other scores."""
    return torch.randn(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


ENCODER_MASKS = {
    "none": lambda dtype: {},
    "causal": lambda dtype: {"src_mask": causal(S), "is_causal": True},
    "boolean": lambda dtype: {"src_mask": per_head(S, S)},
    "additive": lambda dtype: {"src_mask": additive(causal(S), dtype)},
    "padding": lambda dtype: {"src_key_padding_mask": ends(S)},
    "causal and padding": lambda dtype: {"src_mask": causal(S), "is_causal": True, "src_key_padding_mask": ends(S)},
    "both additive": lambda dtype: {
        "src_mask": additive(causal(S), dtype),
        "src_key_padding_mask": additive(ends(S), dtype),
    },
}
DECODER_MASKS = {
    "none": lambda dtype: {},
    "causal": lambda dtype: {"tgt_mask": causal(T), "tgt_is_causal": True},
    "boolean": lambda dtype: {"tgt_mask": per_head(T, T), "memory_mask": per_head(T, S)},
    "additive": lambda dtype: {
        "tgt_mask": additive(causal(T), dtype),
        "memory_mask": torch.randn(T, S, dtype=dtype),
    },
    "padding": lambda dtype: {"tgt_key_padding_mask": ends(T), "memory_key_padding_mask": ends(S)},
    "all": lambda dtype: {
        "tgt_mask": causal(T),
        "tgt_is_causal": True,
        "memory_mask": torch.ones(T, S, dtype=torch.bool).triu(2),
        "memory_is_causal": False,
        "tgt_key_padding_mask": ends(T),
        "memory_key_padding_mask": ends(S),
    },
}


def assert_same(ours: torch.nn.Module, torchs: torch.nn.Module, inputs: list[Tensor], masks: dict[str, object]) -> None:
    """Same outputs, and same gradients of parameters and inputs, in training and in evaluation."""
    dtype = inputs[0].dtype
    torchs.to(dtype)
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases begin as zeros, norms as ones
    ours.to(dtype).load_state_dict(torchs.state_dict(), strict=True)
    results = []
    for module in (ours, torchs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = module.train()(*leaves, **masks)
        module.zero_grad()
        (output * torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        with torch.no_grad():
            evaluated = module.eval()(*inputs, **masks)
        inputs_gradients = {f"input {index}": leaf.grad for index, leaf in enumerate(leaves)}
        results.append({"output": output, "evaluated": evaluated, **gradients, **inputs_gradients})
    largest = max(float(x.detach().abs().max()) for x in results[1].values())
    for name, expected in results[1].items():
        # The floor is for gradients that are zero but for rounding, of the biases of keys.
        scale = max(float(expected.detach().abs().max()), 1e-2 * largest)
        torch.testing.assert_close(
            results[0][name],
            expected,
            rtol=0,
            atol=TOLERANCES[dtype] * scale,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ENCODER_MASKS)
def test_an_encoder_layer_is_torchs(masks: str, norm_first: bool, activation: str, precision: torch.dtype) -> None:
    arguments = (FEATURES, HEADS, HIDDEN, 0.0, activation)
    ours = TransformerEncoderLayer(*arguments, norm_first)
    torchs = torch.nn.TransformerEncoderLayer(*arguments, batch_first=True, norm_first=norm_first)
    inputs = [torch.randn(N, S, FEATURES, dtype=precision)]
    assert_same(ours, torchs, inputs, ENCODER_MASKS[masks](precision))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", DECODER_MASKS)
def test_a_decoder_layer_is_torchs(masks: str, norm_first: bool, activation: str, precision: torch.dtype) -> None:
    arguments = (FEATURES, HEADS, HIDDEN, 0.0, activation)
    ours = TransformerDecoderLayer(*arguments, norm_first)
    torchs = torch.nn.TransformerDecoderLayer(*arguments, batch_first=True, norm_first=norm_first)
    inputs = [torch.randn(N, T, FEATURES, dtype=precision), torch.randn(N, S, FEATURES, dtype=precision)]
    assert_same(ours, torchs, inputs, DECODER_MASKS[masks](precision))


class EncoderDecoder(torch.nn.Module):
    """Our encoder and decoder as ``torch.nn.Transformer`` has them."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = (FEATURES, HEADS, HIDDEN, 0.0, "relu", norm_first)
        self.encoder = TransformerEncoder([TransformerEncoderLayer(*layer) for _ in range(2)], FEATURES)
        self.decoder = TransformerDecoder([TransformerDecoderLayer(*layer) for _ in range(3)], FEATURES)

    def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor, padding: Tensor, **masks: Tensor) -> Tensor:
        memory = self.encoder(src, src_mask, padding)
        return self.decoder(tgt, memory, memory_key_padding_mask=padding, **masks)


class TorchTransformer(torch.nn.Transformer):
    def forward(self, src: Tensor, tgt: Tensor, src_mask: Tensor, padding: Tensor, **masks: Tensor) -> Tensor:  # type: ignore[override]
        masks = {"src_mask": src_mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding, **masks}
        return super().forward(src, tgt, **masks)


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_and_decoder_are_torchs(norm_first: bool, precision: torch.dtype) -> None:
    torchs = TorchTransformer(FEATURES, HEADS, 2, 3, HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
    inputs = [torch.randn(N, S, FEATURES, dtype=precision), torch.randn(N, T, FEATURES, dtype=precision)]
    masks = {
        "src_mask": torch.eye(S, dtype=torch.bool).roll(1, 0),
        "padding": ends(S),
        "tgt_mask": causal(T),
        "memory_mask": torch.ones(T, S, dtype=torch.bool).triu(2),
        "tgt_key_padding_mask": ends(T),
    }
    masks["src_mask"][:, 0] = False
    assert_same(EncoderDecoder(norm_first), torchs, inputs, masks)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_the_network_is_torchs_between_embedding_and_output(norm_first: bool, positions: str) -> None:
    model = models.Transformer(
        *(9, 8, FEATURES, HEADS, 2, 3, HIDDEN, 0.0), norm_first=norm_first, positions=positions, max_length=6
    ).double()
    torchs = torch.nn.Transformer(FEATURES, HEADS, 2, 3, HIDDEN, 0.0, batch_first=True, norm_first=norm_first).double()
    own = {name: x for name, x in model.state_dict().items() if not name.startswith(("encoder.", "decoder."))}
    model.load_state_dict({**own, **torchs.state_dict()}, strict=True)

    source, inputs = torch.tensor([[3, 4, 5, 6, 7], [4, 4, 0, 0, 0]]), torch.tensor([[1, 3, 4, 5], [1, 7, 2, 0]])

    def embedded(side: torch.nn.Module, tokens: Tensor) -> Tensor:
        x = math.sqrt(FEATURES) * side.embedding.weight[tokens]
        if positions == "learned":
            return x + side.positions.weight[: tokens.shape[1]]
        return nn.SinusoidalPositions()(x)

    expected = torchs(
        embedded(model.source_embedding, source),
        embedded(model.target_embedding, inputs),
        tgt_mask=causal(4),
        src_key_padding_mask=source == PADDING,
        memory_key_padding_mask=source == PADDING,
    )
    expected = expected @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(source, inputs), expected, rtol=0, atol=1e-9)


def test_the_base_model_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        model, torchs = models.Transformer(37000, 37000, tie_weights=True), torch.nn.Transformer()
    assert model.output.weight is model.target_embedding.embedding.weight
    between = sum(p.numel() for p in torchs.parameters())
    assert between == 44_140_544
    assert sum(p.numel() for p in model.parameters()) == between + 2 * 37000 * 512 + 37000


def test_initial_weights_are_torchs() -> None:
    torch.manual_seed(0)
    model = models.Transformer(9, 9, 64, 4, 1, 1, 128)
    torchs = torch.nn.Transformer(64, 4, 1, 1, 128)
    for name, expected in torchs.state_dict().items():
        found = model.state_dict()[name]
        if expected.dim() > 1:
            assert found.std().item() == pytest.approx(expected.std().item(), rel=0.05), name
            bound = math.sqrt(6 / sum(expected.shape))
            assert 0.95 * bound < found.abs().max().item() <= bound, name
    assert model.target_embedding(torch.randint(9, (8, 1))).std().item() == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("order", [1, -1], ids=["copy", "reverse"])
def test_it_learns_to_copy_and_to_reverse(norm_first: bool, order: int) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = models.Transformer(8, 8, 32, 4, 1, 1, 64, 0.0, norm_first=norm_first)
    fit(model, lambda: sequence_pairs(64, generator, order), steps=300)
    sources, targets = sequence_pairs(500, generator, order)
    found = decoding.greedy(model, sources, max_length=targets.shape[1])
    assert (found == targets).all(1).float().mean() >= 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "tanh"}, "activation must be one of relu, gelu, got 'tanh'"),
        ({"positions": "rotary"}, "positions must be 'sinusoidal' or 'learned', got 'rotary'"),
        ({"nhead": 7}, "nhead must divide d_model, 512, got 7"),
        ({"nhead": 0}, "nhead must divide d_model, 512, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        models.Transformer(9, 9, **arguments)
