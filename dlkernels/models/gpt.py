"""Decoder-only Transformer language model (Radford et al. 2019, *Language models are unsupervised multitask learners*,
section 2.3: GPT-2; blocks as in Radford et al. 2018, *Improving language understanding by generative pre-training*).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from .. import nn
from .language import KeyValueCache, causal_attention, functions_for, token_loss
from .registry import register


class CausalSelfAttention(torch.nn.Module):
    """Multi-head attention of each token over itself and the tokens before."""

    def __init__(self, d_model: int, nhead: int, dropout: float, layers: ModuleType) -> None:
        super().__init__()
        if nhead < 1 or d_model % nhead != 0:
            raise ValueError(f"nhead must divide d_model, {d_model}, got {nhead}")
        self.nhead = nhead
        self.attention_dropout = dropout
        self.projection = layers.Linear(d_model, 3 * d_model)  # to queries, keys and values
        self.output = layers.Linear(d_model, d_model)

    def forward(self, x: Tensor, past: KeyValueCache | None = None) -> Tensor:
        """``[N, T, d_model]`` to the same. The tokens follow those of ``past``, which they extend."""
        query, key, value = self.projection(x).unflatten(-1, (3, self.nhead, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = past.extend(key, value)  # [N, nhead, S, d_model / nhead]
        dropout_p = self.attention_dropout if self.training else 0.0
        return self.output(causal_attention(functions_for(self.projection), query, key, value, dropout_p))


class FeedForward(torch.nn.Module):
    """Two linear layers with GELU (Hendrycks & Gimpel 2016, in its tanh form) between."""

    def __init__(self, d_model: int, layers: ModuleType) -> None:
        super().__init__()
        self.hidden = layers.Linear(d_model, 4 * d_model)
        self.activation = torch.nn.GELU(approximate="tanh")
        self.output = layers.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x)))


class Block(torch.nn.Module):
    """Attention and two linear layers, each with a layer norm before and a residual sum after."""

    def __init__(self, d_model: int, nhead: int, dropout: float, layers: ModuleType) -> None:
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, nhead, dropout, layers)
        self.dropout1 = torch.nn.Dropout(dropout)
        self.norm2 = torch.nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, layers)
        self.dropout2 = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, past: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout1(self.attention(self.norm1(x), past))
        return x + self.dropout2(self.feed_forward(self.norm2(x)))


@register
class GPT(torch.nn.Module):
    """Language model: tokens ``[N, T]`` to logits of the next token ``[N, T, vocabulary_size]``.

    Args:
        vocabulary_size: number of different tokens.
        max_length: most tokens of a sequence; each position has a learned vector.
        d_model: features of a token.
        nhead: heads of attention, a divisor of ``d_model``.
        num_layers: number of blocks.
        dropout: of the embeddings, of attention weights and of what is added to the residual.
        padding_index: the target that does not count, ``None`` where all do.
        end_index: the token after which a generated sequence is complete, ``None`` where there is none.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``nhead`` does not divide ``d_model``.
    """

    start_index = None

    def __init__(
        self,
        vocabulary_size: int,
        max_length: int = 1024,
        d_model: int = 768,
        nhead: int = 12,
        num_layers: int = 12,
        dropout: float = 0.1,
        padding_index: int | None = None,
        end_index: int | None = None,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.max_length, self.padding_index, self.end_index = max_length, padding_index, end_index
        self.embedding = torch.nn.Embedding(vocabulary_size, d_model)
        self.positions = nn.LearnedPositions(max_length, d_model)
        self.dropout = torch.nn.Dropout(dropout)
        self.blocks = torch.nn.ModuleList(Block(d_model, nhead, dropout, layers) for _ in range(num_layers))
        self.norm = torch.nn.LayerNorm(d_model)
        self.output = layers.Linear(d_model, vocabulary_size, bias=False)
        self.output.weight = self.embedding.weight
        self._initialize()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, T, vocabulary_size]`` of what follows each of the tokens ``[N, T]``.

        Raises:
            ValueError: there are more tokens than positions.
        """
        return self.output(self._hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the targets ``[N, T]``, each token's successor, but padding."""
        return token_loss(self._hidden(tokens), self.output, targets, self.padding_index)

    def start(self) -> list[KeyValueCache]:
        """The state before any token (of :mod:`.decoding`): for each block the keys and values of the tokens so far."""
        return [KeyValueCache() for _ in self.blocks]

    def step(self, tokens: Tensor, state: list[KeyValueCache]) -> tuple[Tensor, list[KeyValueCache]]:
        """Logits ``[N, vocabulary_size]`` of what follows the next tokens ``[N, T]`` (of :mod:`.decoding`)."""
        state = [copy.copy(cache) for cache in state]
        return self.output(self._hidden(tokens, state)[:, -1]), state

    def reorder(self, state: list[KeyValueCache], rows: Tensor) -> list[KeyValueCache]:
        """The state of the sequences ``rows`` ``[M]``, in that order (of :mod:`.decoding`)."""
        return [cache.reorder(rows) for cache in state]

    def _hidden(self, tokens: Tensor, past: list[KeyValueCache] | None = None) -> Tensor:
        first = 0 if past is None else past[0].length
        x = self.dropout(self.positions(self.embedding(tokens), first))  # [N, T, d_model]
        for index, block in enumerate(self.blocks):
            x = block(x, None if past is None else past[index])
        return self.norm(x)

    def _initialize(self) -> None:
        """Weights of standard deviation 0.02, less by ``sqrt(2 num_layers)`` where they feed one of as many residual
        sums, whose variances add up."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                feeds_residual = name.endswith(("attention.output.weight", "feed_forward.output.weight"))
                scale = math.sqrt(2 * len(self.blocks)) if feeds_residual else 1.0
                torch.nn.init.normal_(parameter, std=0.02 / scale)


_GPT2_NAMES = {
    "wte": "embedding",
    "wpe": "positions",
    "h": "blocks",
    "ln_1": "norm1",
    "attn": "attention",
    "c_attn": "projection",
    "c_proj": "output",
    "ln_2": "norm2",
    "mlp": "feed_forward",
    "c_fc": "hidden",
    "ln_f": "norm",
}


def gpt2_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of a ``GPT2LMHeadModel`` or ``GPT2Model`` of Hugging Face's transformers for :class:`GPT`.

    There linear layers are stored transposed, and older files hold the causal masks too.
    """
    converted = {}
    for name, tensor in state_dict.items():
        parts = name.removeprefix("transformer.").split(".")
        if parts[0] == "lm_head" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        is_transposed = parts[-1] == "weight" and parts[-2].startswith("c_")
        converted[".".join(_GPT2_NAMES.get(part, part) for part in parts)] = tensor.t() if is_transposed else tensor
    converted["output.weight"] = converted["embedding.weight"]
    return converted


@register
def gpt2_small(
    vocabulary_size: int = 50257, max_length: int = 1024, dropout: float = 0.1, layers: ModuleType = nn
) -> GPT:
    """GPT-2 small, of 124 million parameters."""
    return GPT(vocabulary_size, max_length, 768, 12, 12, dropout, layers=layers)
