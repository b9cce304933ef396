"""What several networks over tokens share: their loss, causal attention and its cache of keys and values."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import functional, nn


def functions_for(layer: torch.nn.Module) -> ModuleType:
    """The functions of the library that ``layer`` comes from: ``dlkernels.functional`` or ``torch.nn.functional``."""
    return functional if isinstance(layer, nn.Linear | nn.MultiheadAttention) else torch.nn.functional


def token_loss(hidden: Tensor, output: torch.nn.Linear, targets: Tensor, padding_index: int | None = None) -> Tensor:
    """Mean cross-entropy of ``output(hidden)`` over the targets that are not padding.

    On our layers the logits, by far the largest tensor of a language model, are never in memory.

    Args:
        hidden: features ``[N, T, H]``.
        output: the layer from features to logits of the vocabulary.
        targets: the token that each position should predict, ``[N, T]``.
        padding_index: the token that does not count.

    Raises:
        ValueError: ``targets`` has another shape than the tokens.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be shaped as the tokens, {list(hidden.shape[:-1])}, got {list(targets.shape)}")
    rows, targets = hidden.flatten(0, 1), targets.flatten()  # [N * T, H], [N * T]
    ignored = -100 if padding_index is None else padding_index
    if isinstance(output, nn.Linear):
        return functional.linear_cross_entropy(
            rows, output.weight, targets, linear_bias=output.bias, ignore_index=ignored
        )
    return torch.nn.functional.cross_entropy(output(rows), targets, ignore_index=ignored)


def shifted(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Splits ``sequences`` ``[N, T]`` into what a decoder reads and what it should say, both ``[N, T - 1]``.

    Raises:
        ValueError: there is nothing to predict.
    """
    if sequences.dim() != 2 or sequences.shape[1] < 2:
        raise ValueError(f"sequences must be [N, T] with a start and an end symbol, got shape {list(sequences.shape)}")
    return sequences[:, :-1], sequences[:, 1:]


class KeyValueCache:
    """Keys and values ``[N, heads, T, head size]`` of the tokens that one attention layer has seen."""

    def __init__(self, key: Tensor | None = None, value: Tensor | None = None) -> None:
        self.key, self.value = key, value

    @property
    def length(self) -> int:
        """Number of tokens seen."""
        return 0 if self.key is None else self.key.shape[2]

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of further tokens; returns those of all."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, rows: Tensor) -> KeyValueCache:
        """The cache of the sequences ``rows`` ``[M]``, in that order."""
        if self.key is None or self.value is None:
            return KeyValueCache()
        return KeyValueCache(self.key.index_select(0, rows), self.value.index_select(0, rows))


def causal_attention(
    functions: ModuleType, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Attention of the last ``T`` of ``S`` tokens over themselves and the tokens before.

    Args:
        functions: from :func:`functions_for`.
        query: ``[N, heads, T, head size]``.
        key, value: ``[N, heads, S, head size]`` with ``S >= T``.

    Returns:
        ``[N, T, heads * head size]``.
    """
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if 1 < queries < keys:  # the kernel's own causal mask lets query i see keys 0 to i, here 0 to i + S - T
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    attended = functions.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal=queries == keys)
    return attended.transpose(1, 2).flatten(2)
