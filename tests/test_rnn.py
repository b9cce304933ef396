"""Recurrent networks: the language model learns a text by heart, the encoder-decoder learns to copy and to reverse."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io

import pytest
import torch
from torch import Tensor

from dlkernels import models, nn
from dlkernels.models import decoding
from dlkernels.models.rnn import AdditiveAttention, RecurrentEncoder

from .cases.sequences import END, PADDING, fit, sequence_pairs

CELLS = ("rnn", "lstm", "gru")


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text() -> Tensor:
    """The first 200 characters of the Zen of Python, as indices ``[1, 200]``."""
    with contextlib.redirect_stdout(io.StringIO()):
        zen = codecs.decode(importlib.import_module("this").s, "rot13")[:200]
    characters = sorted(set(zen))
    return torch.tensor([[characters.index(character) for character in zen]])


def char_lm(text: Tensor, cell: str) -> models.CharLM:
    torch.manual_seed(0)
    return models.CharLM(int(text.max()) + 1, None, 128, cell=cell)


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_learns_a_text_by_heart(text: Tensor, cell: str) -> None:
    model = char_lm(text, cell)
    fit(model, lambda: (text[:, :-1], text[:, 1:]), steps=150)
    assert torch.equal(decoding.greedy(model, prompt=text[:, :1], max_length=200), text)


def test_truncated_backpropagation_learns_a_text_by_heart(text: Tensor) -> None:
    model = char_lm(text, "lstm")
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    inputs, targets = text[:, :-1].split(50, 1), text[:, 1:].split(50, 1)
    for _ in range(300):
        state = None
        for chunk in zip(inputs, targets, strict=True):
            loss, state = model.truncated_loss(*chunk, state)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert torch.equal(decoding.greedy(model, prompt=text[:, :1], max_length=200), text)


@pytest.mark.parametrize("cell", CELLS)
def test_chunks_carry_the_state_but_no_gradient(cell: str) -> None:
    model = models.CharLM(11, 6, 8, 2, cell).double()
    tokens = torch.randint(11, (3, 13))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    first, state = model.truncated_loss(inputs[:, :6], targets[:, :6])
    second, end = model.truncated_loss(inputs[:, 6:], targets[:, 6:], state)
    torch.testing.assert_close((first + second) / 2, model.loss(inputs, targets), rtol=0, atol=1e-12)
    for carried in (state, end):
        assert not any(x.requires_grad for x in (carried if isinstance(carried, tuple) else (carried,)))
    second.backward()
    read = tokens[:, 6:-1].unique()
    gradient = model.embedding.weight.grad
    assert set(gradient.abs().sum(1).nonzero().flatten().tolist()) == set(read.tolist())


@pytest.mark.parametrize("cell", CELLS)
def test_one_hot_tokens_are_an_embedding_by_the_identity(cell: str) -> None:
    one_hot = models.CharLM(7, None, 5, cell=cell)
    embedded = models.CharLM(7, 7, 5, cell=cell)
    embedded.load_state_dict({**one_hot.state_dict(), "embedding.weight": torch.eye(7)})
    tokens = torch.randint(7, (2, 6))
    torch.testing.assert_close(one_hot(tokens)[0], embedded(tokens)[0])


def test_cells_are_torchs_and_ours() -> None:
    kinds = [type(models.CharLM(7, cell=cell).recurrent) for cell in CELLS]
    assert kinds == [torch.nn.RNN, nn.LSTM, torch.nn.GRU]
    assert type(models.CharLM(7, layers=torch.nn).recurrent) is torch.nn.LSTM
    with pytest.raises(ValueError, match="cell must be one of rnn, lstm, gru, got 'elman'"):
        models.CharLM(7, cell="elman")


def test_tied_weights_are_one_parameter() -> None:
    model = models.CharLM(7, 5, 5, tie_weights=True)
    assert model.output.weight is model.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == 7 * 5 + 7 + 4 * 5 * (5 + 5 + 2)
    for embedding_size in (None, 4):
        with pytest.raises(
            ValueError, match=f"tied weights need embedding_size 5, as hidden_size, got {embedding_size}"
        ):
            models.CharLM(7, embedding_size, 5, tie_weights=True)


@pytest.mark.parametrize("attention", [None, "additive", "dot"])
@pytest.mark.parametrize("order", [1, -1], ids=["copy", "reverse"])
def test_an_encoder_decoder_learns_to_copy_and_to_reverse(attention: str | None, order: int) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = models.Seq2Seq(8, 8, 32, 64, 1, attention)
    fit(model, lambda: sequence_pairs(64, generator, order), steps=300)
    sources, targets = sequence_pairs(500, generator, order)
    found = decoding.greedy(model, sources, max_length=targets.shape[1])
    assert (found == targets).all(1).float().mean() >= 0.99


def test_a_packed_batch_is_encoded_as_each_sequence_alone() -> None:
    encoder = RecurrentEncoder(11, 6, 8, 2, 0.0, PADDING, nn).double()
    tokens = torch.randint(3, 11, (4, 7))
    lengths = [3, 7, 1, 5]
    for row, length in enumerate(lengths):
        tokens[row, length:] = PADDING
    outputs, (hidden, cell) = encoder(tokens)
    assert outputs.shape == (4, 7, 8)
    for row, length in enumerate(lengths):
        alone, (alone_hidden, alone_cell) = encoder(tokens[row : row + 1, :length])
        torch.testing.assert_close(outputs[row : row + 1, :length], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(hidden[:, row : row + 1], alone_hidden, rtol=0, atol=1e-12)
        torch.testing.assert_close(cell[:, row : row + 1], alone_cell, rtol=0, atol=1e-12)
        assert not outputs[row, length:].any()


@pytest.mark.parametrize("wrong", [[0, 0, 0], [0, 3, 4], [3, 0, 4]])
def test_sources_that_are_empty_or_go_on_after_padding_are_refused(wrong: list[int]) -> None:
    model = models.Seq2Seq(8, 8, 4, 4)
    with pytest.raises(
        ValueError, match=rf"a sequence must be tokens and then padding \(0\), got \[{wrong[0]}, {wrong[1]}"
    ):
        model(torch.tensor([[3, 4, 0], wrong]), torch.tensor([[1], [1]]))


def test_additive_attention_follows_its_formula() -> None:
    attend = AdditiveAttention(5, 6, 7, nn).double()
    query, memory = torch.randn(2, 5).double(), torch.randn(2, 4, 6).double()
    visible = torch.tensor([[True, True, True, True], [True, False, True, False]])
    context, weights = attend(query, attend.key(memory), memory, visible)
    for row in range(2):
        scores = torch.stack(
            [attend.score(torch.tanh(attend.query(query[row]) + attend.key(memory[row, i]))) for i in range(4)]
        ).flatten()
        scores[~visible[row]] = -torch.inf
        expected = scores.softmax(0)
        torch.testing.assert_close(weights[row], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(context[row], expected @ memory[row], rtol=0, atol=1e-12)
    assert not weights[~visible].any()


def test_dot_attention_follows_its_formula() -> None:
    model = models.Seq2Seq(11, 11, 6, 8, 1, "dot").double()
    source, inputs = torch.tensor([[5, 3, 8], [7, 4, PADDING]]), torch.tensor([[1, 3, 4, 6], [1, 9, 3, END]])
    memory, state = model.encoder(source)
    features, _ = model.decoder.lstm(model.decoder.embedding(inputs), state)
    scores = (features @ memory.transpose(1, 2)).masked_fill((source == PADDING)[:, None], -torch.inf)
    context = scores.softmax(-1) @ memory
    expected = model.decoder.output(torch.tanh(torch.cat([context, features], -1) @ model.decoder.mix.weight.T))
    torch.testing.assert_close(model(source, inputs), expected, rtol=0, atol=1e-12)


def test_additive_attention_feeds_what_the_state_before_finds() -> None:
    model = models.Seq2Seq(11, 11, 6, 8, 2, "additive").double()
    source, inputs = torch.tensor([[5, 3, 8], [7, 4, PADDING]]), torch.tensor([[1, 3, 4, 6], [1, 9, 3, END]])
    memory, (hidden, cell) = model.encoder(source)
    attend, logits = model.decoder.attend, []
    for token in model.decoder.embedding(inputs).unbind(1):
        context, _ = attend(hidden[-1], attend.key(memory), memory, source != PADDING)
        output, (hidden, cell) = model.decoder.lstm(torch.cat([token, context], -1).unsqueeze(1), (hidden, cell))
        logits.append(model.decoder.output(output))
    torch.testing.assert_close(model(source, inputs), torch.cat(logits, 1), rtol=0, atol=1e-12)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attention must be 'additive', 'dot' or None, got 'general'"):
        models.Seq2Seq(8, 8, attention="general")
