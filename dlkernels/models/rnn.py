"""Recurrent networks: a language model, and an encoder-decoder from sequence to sequence.

- Vanilla RNN: Elman 1990, *Finding structure in time*. LSTM: Hochreiter & Schmidhuber 1997, *Long short-term memory*.
  GRU: Cho et al. 2014, *Learning phrase representations using RNN encoder-decoder*, section 2.3.
- Character language model by truncated backpropagation through time: Mikolov et al. 2010, *Recurrent neural network
  based language model*. Tied embeddings: Press & Wolf 2017, *Using the output embedding to improve language models*.
- Encoder-decoder: Sutskever, Vinyals & Le 2014, *Sequence to sequence learning with neural networks*, section 2.
- Attention: Bahdanau, Cho & Bengio 2015, *Neural machine translation by jointly learning to align and translate*,
  section 3 (``additive``); Luong, Pham & Manning 2015, *Effective approaches to attention-based neural machine
  translation*, section 3.1 (``dot``).
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import nn
from .language import functions_for, shifted, token_loss
from .registry import register

State = Tensor | tuple[Tensor, Tensor] | None  # of torch's RNN and GRU: hidden; of its LSTM: hidden and cell


@register
class CharLM(torch.nn.Module):
    """Language model over characters or any tokens: ``[N, T]`` to logits of the next ones ``[N, T, vocabulary_size]``.

    Args:
        vocabulary_size: number of different tokens.
        embedding_size: features that a token is embedded in; ``None`` feeds it as a one-hot vector.
        hidden_size: features of the state.
        num_layers: recurrent layers, one on top of another.
        cell: ``"rnn"`` (with tanh), ``"lstm"`` or ``"gru"``.
        dropout: after the embedding, between layers and before the output.
        tie_weights: the output layer's weight is the embedding's; needs ``embedding_size == hidden_size``.
        padding_index: the target that does not count, ``None`` where all do.
        end_index: the token after which a generated sequence is complete, ``None`` where there is none.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``cell`` is unknown, or weights are to be tied that differ in shape.
    """

    start_index = None
    max_length = None

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int | None = 64,
        hidden_size: int = 256,
        num_layers: int = 1,
        cell: str = "lstm",
        dropout: float = 0.0,
        tie_weights: bool = False,
        padding_index: int | None = None,
        end_index: int | None = None,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        cells = {"rnn": torch.nn.RNN, "lstm": layers.LSTM, "gru": torch.nn.GRU}
        if cell not in cells:
            raise ValueError(f"cell must be one of {', '.join(cells)}, got {cell!r}")
        if tie_weights and embedding_size != hidden_size:
            raise ValueError(f"tied weights need embedding_size {hidden_size}, as hidden_size, got {embedding_size}")
        self.padding_index, self.end_index = padding_index, end_index
        self.embedding = None if embedding_size is None else torch.nn.Embedding(vocabulary_size, embedding_size)
        self.input_dropout = torch.nn.Dropout(dropout)
        self.recurrent = cells[cell](
            vocabulary_size if embedding_size is None else embedding_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        self.output_dropout = torch.nn.Dropout(dropout)
        self.output = layers.Linear(hidden_size, vocabulary_size)
        if tie_weights and self.embedding is not None:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Logits ``[N, T, vocabulary_size]`` and the state after the last token; ``state`` is that before the first."""
        hidden, state = self._hidden(tokens, state)
        return self.output(hidden), state

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of the targets ``[N, T]``, each token's successor, from a state of zeros."""
        return self.truncated_loss(tokens, targets)[0]

    def truncated_loss(self, tokens: Tensor, targets: Tensor, state: State = None) -> tuple[Tensor, State]:
        """:meth:`loss` of one chunk of a long text, and the state from which the next chunk goes on.

        The state is detached: gradients end at the chunk's beginning (truncated backpropagation through time).
        """
        hidden, state = self._hidden(tokens, state)
        loss = token_loss(hidden, self.output, targets, self.padding_index)
        if isinstance(state, tuple):
            return loss, (state[0].detach(), state[1].detach())
        return loss, None if state is None else state.detach()

    def start(self) -> State:
        """The state before any token (of :mod:`.decoding`)."""
        return None

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits ``[N, vocabulary_size]`` of what follows the next tokens ``[N, T]`` (of :mod:`.decoding`)."""
        hidden, state = self._hidden(tokens, state)
        return self.output(hidden[:, -1]), state

    def reorder(self, state: State, rows: Tensor) -> State:
        """The state of the sequences ``rows`` ``[M]``, in that order (of :mod:`.decoding`)."""
        if isinstance(state, tuple):
            return state[0].index_select(1, rows), state[1].index_select(1, rows)
        return None if state is None else state.index_select(1, rows)

    def _hidden(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        if self.embedding is None:
            one_hot = torch.nn.functional.one_hot(tokens, self.output.out_features)
            x = one_hot.to(self.output.weight.dtype)  # [N, T, vocabulary_size]
        else:
            x = self.embedding(tokens)  # [N, T, embedding_size]
        hidden, state = self.recurrent(self.input_dropout(x), state)  # [N, T, hidden_size]
        return self.output_dropout(hidden), state


class RecurrentEncoder(torch.nn.Module):
    """Embedding and LSTM over padded sequences, each of which is read to its own end and no further."""

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        padding_index: int,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        self.padding_index = padding_index
        self.embedding = torch.nn.Embedding(vocabulary_size, embedding_size, padding_index)
        self.dropout = torch.nn.Dropout(dropout)
        self.lstm = layers.LSTM(
            embedding_size, hidden_size, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Outputs ``[N, T, hidden_size]`` (zeros after a sequence's end), and the last hidden and cell states
        ``[num_layers, N, hidden_size]`` of tokens ``[N, T]`` that are padded at their end.

        Raises:
            ValueError: a sequence is empty or goes on after padding.
        """
        is_token = tokens != self.padding_index
        lengths = is_token.sum(1)
        is_wrong = (lengths == 0) | (is_token[:, 1:] > is_token[:, :-1]).any(1)
        if bool(is_wrong.any()):
            got = tokens[is_wrong][0].tolist()
            raise ValueError(f"a sequence must be tokens and then padding ({self.padding_index}), got {got}")
        embedded = self.dropout(self.embedding(tokens))  # [N, T, embedding_size]
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, state = self.lstm(packed)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=tokens.shape[1])
        return outputs, state


class AdditiveAttention(torch.nn.Module):
    """Weights the rows of a memory by a small network's score of each with the query: ``v^T tanh(W q + U k + b)``."""

    def __init__(self, query_size: int, memory_size: int, hidden_size: int, layers: ModuleType) -> None:
        super().__init__()
        self.query = layers.Linear(query_size, hidden_size, bias=False)
        self.key = layers.Linear(memory_size, hidden_size)
        self.score = layers.Linear(hidden_size, 1, bias=False)

    def forward(self, query: Tensor, keys: Tensor, memory: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weighted mean of the memory, ``[N, memory_size]``, and the weights ``[N, S]``.

        Args:
            query: ``[N, query_size]``.
            keys: ``self.key(memory)``, ``[N, S, hidden_size]``, computed once for many queries.
            memory: ``[N, S, memory_size]``.
            visible: ``[N, S]``; ``False`` hides a row.
        """
        scores = self.score(torch.tanh(self.query(query).unsqueeze(1) + keys)).squeeze(-1)  # [N, S]
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = scores.softmax(-1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


class RecurrentState(NamedTuple):
    """What :class:`RecurrentDecoder` knows between two tokens."""

    hidden: Tensor  # [num_layers, N, hidden_size]
    cell: Tensor  # [num_layers, N, hidden_size]
    memory: Tensor | None = None  # what attention looks at, [N, S, memory_size]
    keys: Tensor | None = None  # of additive attention, [N, S, hidden_size]
    visible: Tensor | None = None  # which rows of the memory are no padding, [N, S]

    def reorder(self, rows: Tensor) -> RecurrentState:
        """The state of the sequences ``rows`` ``[M]``, in that order."""
        attended = (x if x is None else x.index_select(0, rows) for x in (self.memory, self.keys, self.visible))
        return RecurrentState(self.hidden.index_select(1, rows), self.cell.index_select(1, rows), *attended)


class RecurrentDecoder(torch.nn.Module):
    """Embedding, LSTM and output layer, with attention to a memory or without.

    Args:
        attention: ``"additive"`` looks at the memory with the state before each token, and feeds what it finds in
            beside the token (Bahdanau et al.); ``"dot"`` looks with the state after it, and mixes what it finds with
            the output (Luong et al.); ``None`` does not look.
        memory_size: features of the memory; ``hidden_size`` for ``"dot"``.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        padding_index: int,
        attention: str | None,
        memory_size: int,
        layers: ModuleType,
    ) -> None:
        super().__init__()
        if attention not in (None, "additive", "dot"):
            raise ValueError(f"attention must be 'additive', 'dot' or None, got {attention!r}")
        self.embedding = torch.nn.Embedding(vocabulary_size, embedding_size, padding_index)
        self.input_dropout = torch.nn.Dropout(dropout)
        self.lstm = layers.LSTM(
            embedding_size + (memory_size if attention == "additive" else 0),
            hidden_size,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        is_additive = attention == "additive"
        self.attend = AdditiveAttention(hidden_size, memory_size, hidden_size, layers) if is_additive else None
        self.mix = layers.Linear(2 * hidden_size, hidden_size, bias=False) if attention == "dot" else None
        self.output_dropout = torch.nn.Dropout(dropout)
        self.output = layers.Linear(hidden_size, vocabulary_size)

    def start(self, hidden: Tensor, cell: Tensor, memory: Tensor, visible: Tensor | None = None) -> RecurrentState:
        """The state before the first token."""
        if self.attend is None and self.mix is None:
            return RecurrentState(hidden, cell)
        keys = None if self.attend is None else self.attend.key(memory)
        return RecurrentState(hidden, cell, memory, keys, visible)

    def forward(self, tokens: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Features ``[N, T, hidden_size]`` for the output layer, and the state after the tokens ``[N, T]``."""
        embedded = self.input_dropout(self.embedding(tokens))  # [N, T, embedding_size]
        if self.attend is not None:
            features, state = self._attend_before_each_token(embedded, state)
        else:
            features, (hidden, cell) = self.lstm(embedded, (state.hidden, state.cell))
            state = state._replace(hidden=hidden, cell=cell)
        if self.mix is not None:
            features = self._attend_after_all_tokens(features, state)
        return self.output_dropout(features), state

    def logits(self, tokens: Tensor, state: RecurrentState) -> Tensor:
        """``[N, T, vocabulary_size]`` of what follows each of the tokens ``[N, T]``."""
        return self.output(self(tokens, state)[0])

    def loss(self, sequences: Tensor, state: RecurrentState, padding_index: int) -> Tensor:
        """Mean cross-entropy of the sequences ``[N, T]`` but their start symbols and padding."""
        inputs, targets = shifted(sequences)
        return token_loss(self(inputs, state)[0], self.output, targets, padding_index)

    def _attend_before_each_token(self, embedded: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        assert self.attend is not None and state.keys is not None and state.memory is not None
        hidden, cell, features = state.hidden, state.cell, []
        for token in embedded.unbind(1):  # [N, embedding_size]
            context, _ = self.attend(hidden[-1], state.keys, state.memory, state.visible)  # [N, memory_size]
            feature, (hidden, cell) = self.lstm(torch.cat([token, context], -1).unsqueeze(1), (hidden, cell))
            features.append(feature)
        return torch.cat(features, 1), state._replace(hidden=hidden, cell=cell)

    def _attend_after_all_tokens(self, features: Tensor, state: RecurrentState) -> Tensor:
        assert self.mix is not None and state.memory is not None
        memory = state.memory.unsqueeze(1)  # one head: [N, 1, S, hidden_size]
        mask = None if state.visible is None else state.visible[:, None, None]  # [N, 1, 1, S]
        attention = functions_for(self.mix).scaled_dot_product_attention
        context = attention(features.unsqueeze(1), memory, memory, mask, scale=1.0).squeeze(1)
        return torch.tanh(self.mix(torch.cat([context, features], -1)))


@register
class Seq2Seq(torch.nn.Module):
    """LSTM encoder-decoder: the encoder's last state is the decoder's first, and may be all that passes.

    Args:
        source_vocabulary_size, target_vocabulary_size: number of different tokens on either side.
        embedding_size: features that a token is embedded in.
        hidden_size: features of the states.
        num_layers: of the encoder, and of the decoder.
        attention: of the decoder to the encoder's outputs: ``None``, ``"additive"`` or ``"dot"``, see
            :class:`RecurrentDecoder`.
        dropout: after the embeddings, between layers and before the output.
        padding_index, start_index, end_index: the special symbols. Sources are padded at their end; targets begin with
            the start symbol, end with the end symbol and are padded after it.
        layers: where the layers with parameters come from, ``dlkernels.nn`` or ``torch.nn``.

    Raises:
        ValueError: ``attention`` is unknown.
    """

    max_length = None

    def __init__(
        self,
        source_vocabulary_size: int,
        target_vocabulary_size: int,
        embedding_size: int = 256,
        hidden_size: int = 512,
        num_layers: int = 2,
        attention: str | None = None,
        dropout: float = 0.0,
        padding_index: int = 0,
        start_index: int = 1,
        end_index: int = 2,
        layers: ModuleType = nn,
    ) -> None:
        super().__init__()
        self.padding_index, self.start_index, self.end_index = padding_index, start_index, end_index
        self.encoder = RecurrentEncoder(
            source_vocabulary_size, embedding_size, hidden_size, num_layers, dropout, padding_index, layers
        )
        self.decoder = RecurrentDecoder(
            target_vocabulary_size,
            embedding_size,
            hidden_size,
            num_layers,
            dropout,
            padding_index,
            attention,
            hidden_size,
            layers,
        )

    def forward(self, source: Tensor, inputs: Tensor) -> Tensor:
        """Logits ``[N, T, target_vocabulary_size]`` of what follows the inputs ``[N, T]``, given the source ``[N, S]``.

        Raises:
            ValueError: a source is empty or goes on after padding.
        """
        return self.decoder.logits(inputs, self.start(source))

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of the target ``[N, T]`` but its start symbols and padding."""
        return self.decoder.loss(target, self.start(source), self.padding_index)

    def start(self, source: Tensor) -> RecurrentState:
        """The decoder's state before its first token, given the source ``[N, S]`` (of :mod:`.decoding`)."""
        outputs, (hidden, cell) = self.encoder(source)
        return self.decoder.start(hidden, cell, outputs, source != self.padding_index)

    def step(self, tokens: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Logits ``[N, vocabulary_size]`` of what follows the next tokens ``[N, T]`` (of :mod:`.decoding`)."""
        hidden, state = self.decoder(tokens, state)
        return self.decoder.output(hidden[:, -1]), state

    def reorder(self, state: RecurrentState, rows: Tensor) -> RecurrentState:
        """The state of the sequences ``rows`` ``[M]``, in that order (of :mod:`.decoding`)."""
        return state.reorder(rows)
