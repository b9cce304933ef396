"""Every network that writes sequences, in a small configuration, and small tasks that they learn in seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dlkernels import models, nn

PADDING, START, END = 0, 1, 2
VOCABULARY = 11
LENGTH = 9  # of sequences that are written

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = {
    "square": ("####", "####", "####", "####"),
    "ring": ("####", "#..#", "#..#", "####"),
    "cross": ("#..#", ".##.", ".##.", "#..#"),
}
PLACES = {"top left": (0, 0), "top right": (0, 8), "bottom left": (8, 0), "bottom right": (8, 8), "centre": (4, 4)}
WORDS = ["<padding>", "<start>", "<end>", *"a at the what colour is shape it top bottom left right centre".split()]
WORDS += [*COLOURS, *SHAPES]


@dataclass(frozen=True, eq=False)
class Writer:
    """A network that writes sequences about something, or goes on with sequences that are begun."""

    build: Callable[..., torch.nn.Module]  # takes layers
    embedding: str  # name of the module that embeds the tokens written
    context: tuple[Tensor, ...] = ()

    @property
    def sequences(self) -> Tensor:
        """What it learns to write, ``[3, T]``, one of which is longer than :data:`LENGTH`."""
        return SEQUENCES if self.context else SEQUENCES[:, 1:]

    @property
    def prompt(self) -> Tensor | None:
        """The beginnings of the sequences, for a network that has no start symbol."""
        return None if self.context else self.sequences[:, :2]

    def trained(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The network in evaluation mode, after few steps of learning: the recurrent ones are still in doubt."""
        if self not in _trained:
            torch.manual_seed(0)
            _trained[self] = model = self.build(layers=nn)
            fit(model, lambda: (*self.context, *self.loss_arguments()), steps=80)
        return copy.deepcopy(_trained[self]).to(dtype)

    def context_as(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Images in ``dtype``; tokens as they are."""
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.context)

    def loss_arguments(self) -> tuple[Tensor, ...]:
        """What ``loss`` takes after the context."""
        return (self.sequences,) if self.context else (self.sequences[:, :-1], self.sequences[:, 1:])


_trained: dict[Writer, torch.nn.Module] = {}


def logits_of(model: torch.nn.Module, context: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """Logits ``[N, T, V]`` of all tokens at once."""
    output = model(*context, tokens)
    return output[0] if isinstance(output, tuple) else output


def _writers() -> dict[str, Writer]:
    sources = padded([[5, 3, 8, 4, 9], [7, 7, 3], [4]])
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    special = {"padding_index": PADDING, "end_index": END}
    writers = {
        f"char_lm_{cell}": Writer(partial(models.CharLM, VOCABULARY, 8, 12, 2, cell, **special), "embedding")
        for cell in ("rnn", "lstm", "gru")
    }
    for attention in (None, "additive", "dot"):
        build = partial(models.Seq2Seq, VOCABULARY, VOCABULARY, 6, 8, 2, attention)
        writers[f"seq2seq_{attention}"] = Writer(build, "decoder.embedding", (sources,))
    for attention in (False, True):
        build = partial(models.Captioner, VOCABULARY, None, 8, 6, 12, attention)
        writers[f"captioner_attention_{attention}"] = Writer(build, "decoder.embedding", (images,))
    build = partial(models.CaptioningTransformer, VOCABULARY, None, 8, 16, 2, 2, 32, dropout=0.0)
    writers["captioning_transformer"] = Writer(build, "embedding.embedding", (images,))
    for norm_first, positions, tied in ((False, "sinusoidal", False), (True, "learned", True)):
        build = partial(
            models.Transformer,
            VOCABULARY,
            VOCABULARY,
            *(16, 2, 2, 2, 32),
            dropout=0.0,
            norm_first=norm_first,
            positions=positions,
            max_length=14,
            tie_weights=tied,
        )
        name = "transformer_pre_norm" if norm_first else "transformer_post_norm"
        writers[name] = Writer(build, "target_embedding.embedding", (sources,))
    writers["gpt"] = Writer(partial(models.GPT, VOCABULARY, 14, 16, 2, 2, dropout=0.0, **special), "embedding")
    return writers


def encoded(sentence: str) -> list[int]:
    """A sentence as the indices of its words in ``WORDS``."""
    return [WORDS.index(word) for word in sentence.split()]


def padded(sequences: list[list[int]]) -> Tensor:
    """Sequences of different lengths as one batch ``[N, T]``."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


SEQUENCES = padded([[START, 5, 3, 8, 4, 9, END], [START, 7, 9, 7, END], [START, 6, 10, *(8, 3, 3, 5) * 2, 4, END]])
WRITERS = _writers()


def picture(colour: str, shape: str, place: str, generator: torch.Generator) -> Tensor:
    """A coloured shape near a place of a noisy image ``[3, 16, 16]``."""
    image = 0.2 * torch.randn(3, 16, 16, generator=generator)
    mask = torch.tensor([[pixel == "#" for pixel in row] for row in SHAPES[shape]])  # [4, 4]
    top, left = (edge + int(torch.randint(5, (), generator=generator)) for edge in PLACES[place])
    image[:, top : top + 4, left : left + 4] += torch.tensor(COLOURS[colour])[:, None, None] * mask
    return image


def sequence_pairs(count: int, generator: torch.Generator, order: int) -> tuple[Tensor, Tensor]:
    """Sources of two to five tokens of five kinds, and as targets the same forwards (``order`` 1) or backwards (-1)."""
    lengths = torch.randint(2, 6, (count,), generator=generator).tolist()
    tokens = torch.randint(3, 8, (count, 5), generator=generator).tolist()
    sources = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    return padded(sources), padded([[START, *source[::order], END] for source in sources])


def fit(
    model: torch.nn.Module, batch: Callable[[], tuple[Tensor, ...]], steps: int, learning_rate: float = 1e-2
) -> None:
    """Trains ``model`` by Adam with clipped gradients; the rate rises over a tenth of the steps, then falls."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(*batch()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()
