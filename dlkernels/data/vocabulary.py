"""Symbols and their numbers: characters or words of a text, and the special ones that every vocabulary begins with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")
PADDING, START, END, UNKNOWN = range(len(SPECIAL))

# A word, a mark of punctuation or the end of a line. Other white space is not kept.
WORD = re.compile(r"\w+|[^\w\s]|\n")
TOKENS = ("character", "word")


def split(text: str, tokens: str) -> Sequence[str]:
    """The characters or the words of ``text``."""
    return WORD.findall(text) if tokens == "word" else text


@dataclass(frozen=True)
class Vocabulary:
    """The symbols that a network knows, special ones first. A symbol's index is its number."""

    symbols: tuple[str, ...]
    tokens: str = "word"  # or "character": what a text is split into
    _numbers: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens must be {' or '.join(TOKENS)}, got {self.tokens!r}")
        object.__setattr__(self, "_numbers", {symbol: number for number, symbol in enumerate(self.symbols)})

    @classmethod
    def of(cls, symbols: Iterable[str], tokens: str = "word") -> Vocabulary:
        """The special symbols and ``symbols``, in this order."""
        return cls((*SPECIAL, *symbols), tokens)

    @classmethod
    def of_text(cls, text: str, tokens: str = "character", limit: int = 10_000) -> Vocabulary:
        """The ``limit`` most frequent characters or words of ``text``, in alphabetical order.

        Raises:
            ValueError: ``tokens`` is neither ``"character"`` nor ``"word"``.
        """
        counts = Counter(split(text, tokens))
        # Among equals the alphabet decides, so that the same text gives the same vocabulary.
        frequent = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[:limit]
        return cls.of(sorted(frequent), tokens)

    def __len__(self) -> int:
        return len(self.symbols)

    def numbers(self, symbols: Iterable[str]) -> Tensor:
        """The numbers of ``symbols``, int64 ``[T]``; those it does not know become the unknown symbol."""
        return torch.tensor([self._numbers.get(symbol, UNKNOWN) for symbol in symbols], dtype=torch.int64)

    def encode(self, text: str) -> Tensor:
        """The numbers of the characters or words of ``text``, int64 ``[T]``."""
        return self.numbers(split(text, self.tokens))

    def decode(self, numbers: Tensor) -> str:
        """The text of ``numbers``; words are separated by a space, and the special symbols appear as they are named."""
        return ("" if self.tokens == "character" else " ").join(self.symbols[number] for number in numbers.tolist())


def padded(sequences: Sequence[Tensor]) -> Tensor:
    """Sequences of different lengths as the rows of one tensor, int64 ``[N, longest]``, padded at their ends."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=PADDING)
