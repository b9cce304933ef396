"""Writing sequences with a model, token by token: greedily, by sampling, or by beam search.

Every network of this package that writes sequences is a :class:`SequenceModel`; so is any class that has its members.
Keys, values and states of the tokens so far are kept, so that each step computes one token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class SequenceModel(Protocol):
    """What decoding asks of a model, which is a ``torch.nn.Module`` besides."""

    start_index: int | None  # the token that every sequence begins with, None if the caller gives the beginning
    end_index: int | None  # the token after which a sequence is complete, None if there is none
    padding_index: int | None  # what follows the end, and is never written before it
    max_length: int | None  # most tokens of a sequence, None for any number

    def start(self, *context: Tensor) -> Any:
        """The state before the first token, given what the sequences are about: sources, images, or nothing."""

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads further tokens ``[N, T]``; returns logits ``[N, V]`` of what follows the last, and the new state.
        ``state`` is not changed."""

    def reorder(self, state: Any, rows: Tensor) -> Any:
        """The state of the sequences ``rows`` ``[M]``, in that order, some repeated and some left out."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """As of ``torch.nn.Module``."""


def greedy(model: SequenceModel, *context: Tensor, max_length: int, prompt: Tensor | None = None) -> Tensor:
    """Always the most probable next token.

    Args:
        context: what the model's ``start`` takes: sources, images, or nothing.
        max_length: most tokens of a sequence, with the prompt and the end symbol.
        prompt: the beginning ``[N, P]`` of the sequences; by default the model's start symbol.

    Returns:
        Sequences ``[N, L]`` with their prompts and end symbols, padded after these; ``L <= max_length``.

    Raises:
        ValueError: there is no prompt or an empty one, or ``max_length`` leaves no token to write or is more than the
            model has positions for.

    Examples:
        >>> from dlkernels.models import CharLM
        >>> model = CharLM(vocabulary_size=20)
        >>> prompt = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> greedy(model, prompt=prompt, max_length=7).shape
        torch.Size([3, 7])
    """
    return _generate(model, context, prompt, max_length, lambda log_probabilities: log_probabilities.argmax(-1))


def sample(
    model: SequenceModel,
    *context: Tensor,
    max_length: int,
    prompt: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each next token drawn at random from the model's distribution.

    Args:
        temperature: what logits are divided by: below 1 makes probable tokens more probable, above 1 less.
        top_k: draw from this many most probable tokens only (Fan et al. 2018, *Hierarchical neural story generation*).
        generator: where randomness comes from; by default torch's global one.

    Other arguments, results and errors are those of :func:`greedy`.

    Raises:
        ValueError: ``temperature`` is not a positive number, or ``top_k`` is less than 1.

    Examples:
        >>> from dlkernels.models import CharLM
        >>> model = CharLM(vocabulary_size=20)
        >>> prompt = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> sample(model, prompt=prompt, max_length=7, temperature=0.8, top_k=5).shape
        torch.Size([3, 7])
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")

    def choose(log_probabilities: Tensor) -> Tensor:
        if top_k is not None:
            largest, tokens = log_probabilities.topk(min(top_k, log_probabilities.shape[-1]))
            log_probabilities = torch.full_like(log_probabilities, float("-inf")).scatter(-1, tokens, largest)
        return torch.multinomial((log_probabilities / temperature).softmax(-1), 1, generator=generator).squeeze(-1)

    return _generate(model, context, prompt, max_length, choose)


@torch.no_grad()
def beam_search(
    model: SequenceModel,
    *context: Tensor,
    max_length: int,
    prompt: Tensor | None = None,
    beams: int = 4,
    length_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The best of the sequences found by keeping, at each step, the ``beams`` most probable beginnings.

    A complete sequence keeps its place among the beams to the end, so that ever fewer incomplete ones are followed
    (Sutskever et al. 2014, section 3.2; Bahdanau et al. 2015). With one beam this is greedy search.

    Args:
        beams: how many beginnings are kept for each sequence.
        length_penalty: complete sequences are compared by their log probability divided by this power of their number
            of tokens after the prompt; 0 compares the probabilities, which favours short sequences.

    Other arguments and errors are those of :func:`greedy`.

    Returns:
        Sequences ``[N, L]`` as from :func:`greedy`, and what they were chosen by, ``[N]``.

    Raises:
        ValueError: ``beams`` is less than 1.

    Examples:
        >>> from dlkernels.models import CharLM
        >>> model = CharLM(vocabulary_size=20)
        >>> prompt = torch.tensor([[1, 2], [3, 4], [5, 6]])
        >>> sequences, scores = beam_search(model, prompt=prompt, max_length=7, beams=4)
        >>> sequences.shape, scores.shape
        (torch.Size([3, 7]), torch.Size([3]))
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    tokens = _beginning(model, context, prompt, max_length)  # [N, P]
    prompt_length = tokens.shape[1]
    with _evaluating(model):
        log_probabilities, state = _read(model, tokens, model.start(*context))  # [N, V]
        batch = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)  # [N, 1]
        rows = batch.expand(-1, beams).flatten()
        tokens, log_probabilities, state = tokens[rows], log_probabilities[rows], model.reorder(state, rows)
        total = log_probabilities.new_full((len(batch), beams), float("-inf"))  # log probability of each beam
        total[:, 0] = 0  # the other beams are copies, which nothing may choose before they differ
        complete = torch.zeros_like(total, dtype=torch.bool)
        lengths = torch.zeros_like(total)
        while True:
            parent, token, total = _best_continuations(model, log_probabilities, total, complete)
            complete, lengths = complete.gather(1, parent), lengths.gather(1, parent)
            lengths = lengths + ~complete
            complete = complete | _ends(model, token) & total.isfinite()
            rows = (batch * beams + parent).flatten()  # [N * beams]
            tokens = torch.cat([tokens[rows], token.view(-1, 1)], 1)
            if tokens.shape[1] == max_length or bool(complete.all()):
                break
            log_probabilities, state = _read(model, token.view(-1, 1), model.reorder(state, rows))
    scores, best = (total / lengths**length_penalty).max(1)
    longest = prompt_length + int(lengths.gather(1, best.unsqueeze(1)).max())
    return tokens.unflatten(0, (-1, beams))[batch.squeeze(1), best, :longest], scores


def _best_continuations(
    model: SequenceModel, log_probabilities: Tensor, total: Tensor, complete: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``beams`` best of all beams' continuations by one token: the beam that each continues, the token, and the
    total log probability, ``[N, beams]`` each."""
    beams, vocabulary_size = total.shape[1], log_probabilities.shape[-1]
    rank = total.unsqueeze(-1) + log_probabilities.unflatten(0, (-1, beams))  # [N, beams, V]
    # A complete beam goes on with padding, before all others.
    filler = torch.arange(vocabulary_size, device=rank.device) == _filler(model)
    rank = rank.masked_fill(complete.unsqueeze(-1), float("-inf"))
    rank = rank.masked_fill(complete.unsqueeze(-1) & filler, float("inf"))
    best, chosen = rank.flatten(1).topk(beams)
    parent, token = chosen // vocabulary_size, chosen % vocabulary_size
    return parent, token, torch.where(complete.gather(1, parent), total.gather(1, parent), best)


@torch.no_grad()
def _generate(
    model: SequenceModel,
    context: tuple[Tensor, ...],
    prompt: Tensor | None,
    max_length: int,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    tokens = _beginning(model, context, prompt, max_length)  # [N, P]
    complete = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with _evaluating(model):
        log_probabilities, state = _read(model, tokens, model.start(*context))  # [N, V]
        while True:
            token = choose(log_probabilities)  # [N]
            if model.end_index is not None:
                token = token.masked_fill(complete, _filler(model))
            complete = complete | _ends(model, token)
            tokens = torch.cat([tokens, token.unsqueeze(1)], 1)
            if tokens.shape[1] == max_length or bool(complete.all()):
                return tokens
            log_probabilities, state = _read(model, token.unsqueeze(1), state)


def _beginning(model: SequenceModel, context: tuple[Tensor, ...], prompt: Tensor | None, max_length: int) -> Tensor:
    """The tokens ``[N, P]`` that sequences begin with, checked."""
    if prompt is None:
        if model.start_index is None or not context:
            raise ValueError(f"prompt must be given to {type(model).__name__}, which begins no sequence by itself")
        prompt = torch.full((len(context[0]), 1), model.start_index, device=context[0].device)
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"prompt must be [N, P] with at least one token, got shape {list(prompt.shape)}")
    if max_length <= prompt.shape[1]:
        raise ValueError(f"max_length must be more than the {prompt.shape[1]} tokens of the prompt, got {max_length}")
    if model.max_length is not None and max_length > model.max_length:
        raise ValueError(f"max_length must be at most {model.max_length}, the model's positions, got {max_length}")
    return prompt


def _read(model: SequenceModel, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Log probabilities ``[N, V]`` of what follows the tokens ``[N, T]``, which padding never does; the new state."""
    logits, state = model.step(tokens, state)
    log_probabilities = logits.float().log_softmax(-1)
    if model.padding_index is not None:
        log_probabilities[:, model.padding_index] = float("-inf")
    return log_probabilities, state


def _filler(model: SequenceModel) -> int:
    """What follows an end symbol: padding, or the end symbol again for a model without padding."""
    filler = model.end_index if model.padding_index is None else model.padding_index
    return -1 if filler is None else filler


def _ends(model: SequenceModel, token: Tensor) -> Tensor:
    return torch.zeros_like(token, dtype=torch.bool) if model.end_index is None else token == model.end_index


@contextlib.contextmanager
def _evaluating(model: SequenceModel) -> Iterator[None]:
    """Evaluation mode, in which nothing is dropped; afterwards each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
