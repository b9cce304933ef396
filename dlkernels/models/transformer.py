"""Transformer encoder-decoder (Vaswani et al. 2017, *Attention is all you need*, sections 3.1 to 3.5).

Layer norms stand after each residual sum (post-norm, as in the paper) or before each block (pre-norm; Xiong et al.
2020, *On layer normalization in the Transformer architecture*). Layers, encoder and decoder have the parameters of
those of ``torch.nn`` by the same names, and one more layer norm at their end, as in ``torch.nn.Transformer``. Batches
come first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import nn
from .language import KeyValueCache, causal_attention, functions_for, shifted, token_loss
from .registry import register

ACTIVATIONS = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU}


def _activation(name: str) -> torch.nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


def _attention(d_model: int, nhead: int, dropout: float, layers: ModuleType) -> torch.nn.MultiheadAttention:
    if nhead < 1 or d_model % nhead != 0:
        raise ValueError(f"nhead must divide d_model, {d_model}, got {nhead}")
    return layers.MultiheadAttention(d_model, nhead, dropout, batch_first=True)


class TransformerEncoderLayer(torch.nn.Module):
    """Self-attention and a two-layer network, each with a residual sum: ``torch.nn.TransformerEncoderLayer``.

    Args:
        d_model: features of the sequence.
        nhead: heads of attention, a divisor of ``d_model``.
        dim_feedforward: features between the two linear layers.
        dropout: of attention weights, between the linear layers, and of what is added to the residual.
        activation: ``"relu"`` or ``"gelu"``.
        norm_first: pre-norm instead of post-norm.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``activation`` is unknown, or ``nhead`` does not divide ``d_model``.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = _attention(d_model, nhead, dropout, layers)
        self.linear1 = layers.Linear(d_model, dim_feedforward)
        self.activation = _activation(activation)
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = layers.Linear(dim_feedforward, d_model)
        self.norm1 = torch.nn.LayerNorm(d_model)
        self.norm2 = torch.nn.LayerNorm(d_model)
        self.dropout1 = torch.nn.Dropout(dropout)
        self.dropout2 = torch.nn.Dropout(dropout)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``[N, S, d_model]`` to the same.

        Args:
            src_mask: ``[S, S]`` or ``[N * nhead, S, S]``; ``True`` hides a key from a query, a float is added.
            src_key_padding_mask: ``[N, S]``; ``True`` hides a key from all queries, a float is added.
            is_causal: a hint that ``src_mask`` is the causal mask.
        """

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask, is_causal=is_causal
            )[0]

        if self.norm_first:
            src = src + self.dropout1(attend(self.norm1(src)))
            return src + self.dropout2(self._feed_forward(self.norm2(src)))
        src = self.norm1(src + self.dropout1(attend(src)))
        return self.norm2(src + self.dropout2(self._feed_forward(src)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerDecoderLayer(torch.nn.Module):
    """Self-attention, attention to the encoder's output (the memory) and a two-layer network, each with a residual sum:
    ``torch.nn.TransformerDecoderLayer``. Arguments and errors are those of :class:`TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = _attention(d_model, nhead, dropout, layers)
        self.multihead_attn = _attention(d_model, nhead, dropout, layers)
        self.linear1 = layers.Linear(d_model, dim_feedforward)
        self.activation = _activation(activation)
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = layers.Linear(dim_feedforward, d_model)
        self.norm1 = torch.nn.LayerNorm(d_model)
        self.norm2 = torch.nn.LayerNorm(d_model)
        self.norm3 = torch.nn.LayerNorm(d_model)
        self.dropout1 = torch.nn.Dropout(dropout)
        self.dropout2 = torch.nn.Dropout(dropout)
        self.dropout3 = torch.nn.Dropout(dropout)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """``tgt`` ``[N, T, d_model]`` to the same, given ``memory`` ``[N, S, d_model]``.

        Args:
            tgt_mask, memory_mask: ``[T, T]`` and ``[T, S]``, or one for each of ``N * nhead``; ``True`` hides a key
                from a query, a float is added.
            tgt_key_padding_mask, memory_key_padding_mask: ``[N, T]`` and ``[N, S]``; ``True`` hides a key from all
                queries, a float is added.
            tgt_is_causal, memory_is_causal: hints that the masks are causal.
        """

        def attend_self(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, tgt_key_padding_mask, need_weights=False, attn_mask=tgt_mask, is_causal=tgt_is_causal
            )[0]

        def attend_memory(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x,
                memory,
                memory,
                memory_key_padding_mask,
                need_weights=False,
                attn_mask=memory_mask,
                is_causal=memory_is_causal,
            )[0]

        return self._blocks(tgt, attend_self, attend_memory)

    def remember(self, memory: Tensor) -> KeyValueCache:
        """The memory's keys and values for :meth:`step`."""
        key, value = _project(self.multihead_attn, memory, slice(self.multihead_attn.embed_dim, None))
        return KeyValueCache(key, value)

    def step(self, tgt: Tensor, past: KeyValueCache, memory: KeyValueCache, visible: Tensor | None) -> Tensor:
        """:meth:`forward` under the causal mask for tokens ``[N, T, d_model]`` that follow those of ``past``, which it
        extends. ``visible`` ``[N, 1, 1, S]``: ``False`` hides a key of the memory.
        """

        def attend_self(x: Tensor) -> Tensor:
            query, key, value = _project(self.self_attn, x, slice(None))
            attended = causal_attention(functions_for(self.self_attn), query, *past.extend(key, value))
            return _project_output(self.self_attn, attended)

        def attend_memory(x: Tensor) -> Tensor:
            (query,) = _project(self.multihead_attn, x, slice(self.multihead_attn.embed_dim))
            attention = functions_for(self.multihead_attn).scaled_dot_product_attention
            attended = attention(query, memory.key, memory.value, visible)  # [N, nhead, T, head size]
            return _project_output(self.multihead_attn, attended.transpose(1, 2).flatten(2))

        return self._blocks(tgt, attend_self, attend_memory)

    def _blocks(
        self, x: Tensor, attend_self: Callable[[Tensor], Tensor], attend_memory: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.norm_first:
            x = x + self.dropout1(attend_self(self.norm1(x)))
            x = x + self.dropout2(attend_memory(self.norm2(x)))
            return x + self.dropout3(self._feed_forward(self.norm3(x)))
        x = self.norm1(x + self.dropout1(attend_self(x)))
        x = self.norm2(x + self.dropout2(attend_memory(x)))
        return self.norm3(x + self.dropout3(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def _project(attention: torch.nn.MultiheadAttention, x: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """What ``rows`` of the input projection give of queries, keys and values: ``[N, nhead, T, head size]`` each."""
    weight, bias = attention.in_proj_weight[rows], attention.in_proj_bias[rows]
    projected = functions_for(attention).linear(x, weight, bias)  # [N, T, 1 to 3 times d_model]
    return projected.unflatten(-1, (-1, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4).unbind()


def _project_output(attention: torch.nn.MultiheadAttention, x: Tensor) -> Tensor:
    return functions_for(attention).linear(x, attention.out_proj.weight, attention.out_proj.bias)


class TransformerEncoder(torch.nn.Module):
    """Encoder layers and a last layer norm."""

    def __init__(self, encoder_layers: Sequence[TransformerEncoderLayer], d_model: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(encoder_layers)
        self.norm = torch.nn.LayerNorm(d_model)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``[N, S, d_model]`` to the same; masks as in :class:`TransformerEncoderLayer`."""
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal)
        return self.norm(src)


class TransformerState(NamedTuple):
    """What :class:`TransformerDecoder` knows between two tokens."""

    past: list[KeyValueCache]  # for each layer, of the tokens
    memory: list[KeyValueCache]  # for each layer, of the encoder's output
    visible: Tensor | None  # which of the encoder's outputs are no padding, [N, 1, 1, S]

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.past[0].length

    def reorder(self, rows: Tensor) -> TransformerState:
        """The state of the sequences ``rows`` ``[M]``, in that order."""
        return TransformerState(
            [cache.reorder(rows) for cache in self.past],
            [cache.reorder(rows) for cache in self.memory],
            None if self.visible is None else self.visible.index_select(0, rows),
        )


class TransformerDecoder(torch.nn.Module):
    """Decoder layers and a last layer norm, over whole sequences or step by step."""

    def __init__(self, decoder_layers: Sequence[TransformerDecoderLayer], d_model: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(decoder_layers)
        self.norm = torch.nn.LayerNorm(d_model)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """``tgt`` ``[N, T, d_model]`` to the same; memory and masks as in :class:`TransformerDecoderLayer`."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        return self.norm(tgt)

    def causal(self, tgt: Tensor, memory: Tensor, memory_key_padding_mask: Tensor | None = None) -> Tensor:
        """:meth:`forward` where each token sees itself and those before. Padding after a sequence needs no mask."""
        length = tgt.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tgt.device).triu(1)
        return self(tgt, memory, mask, memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=True)

    def start(self, memory: Tensor, memory_key_padding_mask: Tensor | None = None) -> TransformerState:
        """The state before the first token."""
        layers = cast(Sequence[TransformerDecoderLayer], self.layers)
        visible = None if memory_key_padding_mask is None else ~memory_key_padding_mask[:, None, None]
        return TransformerState([KeyValueCache() for _ in layers], [x.remember(memory) for x in layers], visible)

    def step(self, tgt: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """What :meth:`causal` gives for the next tokens ``[N, T, d_model]``, and the state after them."""
        layers = cast(Sequence[TransformerDecoderLayer], self.layers)
        state = state._replace(past=[copy.copy(cache) for cache in state.past])
        for layer, past, memory in zip(layers, state.past, state.memory, strict=True):
            tgt = layer.step(tgt, past, memory, state.visible)
        return self.norm(tgt), state


class TokenEmbedding(torch.nn.Module):
    """Tokens embedded and scaled by ``sqrt(d_model)``, plus their positions (sections 3.4 and 3.5), with dropout."""

    def __init__(
        self, vocabulary_size: int, d_model: int, dropout: float, padding_index: int, positions: torch.nn.Module
    ) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary_size, d_model, padding_index)
        self.positions = positions
        self.dropout = torch.nn.Dropout(dropout)
        # Scaled, the embedding is of the size of the positions; unscaled, as an output layer, it gives logits around 1.
        torch.nn.init.normal_(self.embedding.weight, std=d_model**-0.5)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Tokens ``[N, T]`` at positions from ``first`` on to ``[N, T, d_model]``."""
        embedded = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return self.dropout(self.positions(embedded, first))


@register
class Transformer(torch.nn.Module):
    """Transformer from sequence to sequence; the paper's base model by default.

    ``encoder`` and ``decoder`` take the state of ``torch.nn.Transformer``'s.

    Args:
        source_vocabulary_size, target_vocabulary_size: number of different tokens on either side.
        d_model, nhead, dim_feedforward, dropout, activation, norm_first: of the layers, see
            :class:`TransformerEncoderLayer`.
        num_encoder_layers, num_decoder_layers: how many layers.
        positions: ``"sinusoidal"`` or ``"learned"``.
        max_length: most tokens of a sequence, where positions are learned.
        tie_weights: the output layer's weight is the target embedding's.
        padding_index, start_index, end_index: the special symbols. Sources are padded at their end; targets begin with
            the start symbol, end with the end symbol and are padded after it.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``activation`` or ``positions`` is unknown, or ``nhead`` does not divide ``d_model``.
    """

    def __init__(
        self,
        source_vocabulary_size: int,
        target_vocabulary_size: int,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm_first: bool = False,
        positions: str = "sinusoidal",
        max_length: int = 512,
        tie_weights: bool = False,
        padding_index: int = 0,
        start_index: int = 1,
        end_index: int = 2,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        if positions not in ("sinusoidal", "learned"):
            raise ValueError(f"positions must be 'sinusoidal' or 'learned', got {positions!r}")
        self.padding_index, self.start_index, self.end_index = padding_index, start_index, end_index
        self.max_length = max_length if positions == "learned" else None

        def embedding(vocabulary_size: int) -> TokenEmbedding:
            learned = positions == "learned"
            encoding = nn.LearnedPositions(max_length, d_model) if learned else nn.SinusoidalPositions()
            return TokenEmbedding(vocabulary_size, d_model, dropout, padding_index, encoding)

        self.source_embedding = embedding(source_vocabulary_size)
        self.target_embedding = embedding(target_vocabulary_size)
        layer = (d_model, nhead, dim_feedforward, dropout, activation, norm_first, layers)
        self.encoder = TransformerEncoder([TransformerEncoderLayer(*layer) for _ in range(num_encoder_layers)], d_model)
        self.decoder = TransformerDecoder([TransformerDecoderLayer(*layer) for _ in range(num_decoder_layers)], d_model)
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:  # as torch.nn.Transformer
                torch.nn.init.xavier_uniform_(parameter)
        self.output = layers.Linear(d_model, target_vocabulary_size)
        if tie_weights:
            self.output.weight = self.target_embedding.embedding.weight

    def forward(self, source: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[N, T, target_vocabulary_size]`` of what follows the inputs ``[N, T]``, given the source ``[N, S]``.

        Raises:
            ValueError: a sequence is longer than the learned positions.
        """
        return self.output(self._hidden(source, inputs))

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the target ``[N, T]`` but its start symbols and padding."""
        inputs, targets = shifted(target)
        return token_loss(self._hidden(source, inputs), self.output, targets, self.padding_index)

    def start(self, source: Tensor) -> TransformerState:
        """The decoder's state before its first token, given the source ``[N, S]`` (of :mod:`.decoding`)."""
        return self.decoder.start(*self._encode(source))

    def step(self, tokens: Tensor, state: TransformerState) -> tuple[Tensor, TransformerState]:
        """Logits ``[N, vocabulary_size]`` of what follows the next tokens ``[N, T]`` (of :mod:`.decoding`)."""
        hidden, state = self.decoder.step(self.target_embedding(tokens, state.length), state)
        return self.output(hidden[:, -1]), state

    def reorder(self, state: TransformerState, rows: Tensor) -> TransformerState:
        """The state of the sequences ``rows`` ``[M]``, in that order (of :mod:`.decoding`)."""
        return state.reorder(rows)

    def _encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output ``[N, S, d_model]``, and where it is padding, ``[N, S]``."""
        is_padding = source == self.padding_index
        return self.encoder(self.source_embedding(source), src_key_padding_mask=is_padding), is_padding

    def _hidden(self, source: Tensor, inputs: Tensor) -> Tensor:
        memory, is_padding = self._encode(source)
        return self.decoder.causal(self.target_embedding(inputs), memory, is_padding)  # [N, T, d_model]
