"""Decoding: step by step as all at once, and greedy, sampled and beam search find what they should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dlkernels.models import decoding

from .cases.sequences import END, LENGTH, PADDING, VOCABULARY, WRITERS, Writer, logits_of


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """So small networks gain nothing from more, and the test processes share the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=WRITERS)
def writer(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


class Chain(torch.nn.Module):
    """A model whose next token depends on the last one alone, by a table ``[V, V]`` of probabilities."""

    start_index, max_length = 1, None

    def __init__(self, table: Tensor, end_index: int = END, padding_index: int | None = PADDING) -> None:
        super().__init__()
        self.table, self.end_index, self.padding_index = table, end_index, padding_index

    def start(self, *context: Tensor) -> None:
        """There is no state."""

    def step(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
        return self.table[tokens[:, -1]].log(), None

    def reorder(self, state: None, rows: Tensor) -> None:
        pass


def test_step_by_step_as_all_at_once(writer: Writer) -> None:
    model = writer.trained()
    tokens = torch.randint(3, VOCABULARY, (3, LENGTH))
    expected = logits_of(model, writer.context, tokens)
    assert expected.std() > 0.3
    state = model.start(*writer.context)
    end = 0
    for count in (3, 1, 2, 1, 2):  # tokens at once
        end += count
        logits, state = model.step(tokens[:, end - count : end], state)
        torch.testing.assert_close(logits, expected[:, end - 1], rtol=0, atol=1e-5)
    assert end == LENGTH


def test_a_step_leaves_its_state_as_it_was(writer: Writer) -> None:
    model = writer.trained()
    tokens = torch.randint(3, VOCABULARY, (3, 5))
    _, state = model.step(tokens[:, :3], model.start(*writer.context))
    first, _ = model.step(tokens[:, 3:4], state)
    model.step(tokens[:, 4:], state)
    again, _ = model.step(tokens[:, 3:4], state)
    assert torch.equal(first, again)


def test_states_are_reordered_with_their_sequences(writer: Writer) -> None:
    model = writer.trained()
    tokens = torch.randint(3, VOCABULARY, (3, 4))
    _, state = model.step(tokens[:, :3], model.start(*writer.context))
    rows = torch.tensor([2, 0, 0, 1])
    logits, _ = model.step(tokens[rows, 3:], model.reorder(state, rows))
    expected, _ = model.step(tokens[:, 3:], state)
    torch.testing.assert_close(logits, expected[rows], rtol=0, atol=1e-6)


def test_greedy_as_without_a_cache(writer: Writer) -> None:
    model = writer.trained()
    prompt = writer.prompt
    tokens = torch.full((3, 1), model.start_index) if prompt is None else prompt
    while tokens.shape[1] < LENGTH:
        logits = logits_of(model, writer.context, tokens)[:, -1]
        logits[:, PADDING] = -math.inf
        token = logits.argmax(-1)
        token[(tokens == END).any(1)] = PADDING
        tokens = torch.cat([tokens, token.unsqueeze(1)], 1)
    found = decoding.greedy(model, *writer.context, max_length=LENGTH, prompt=prompt)
    assert torch.equal(found, tokens[:, : found.shape[1]])
    assert bool((tokens[:, found.shape[1] :] == PADDING).all())
    assert len(tokens.unique(dim=0)) == 3  # it says something about what it is given


def test_a_batch_as_each_alone(writer: Writer) -> None:
    model = writer.trained()
    prompt = writer.prompt

    def results(context: tuple[Tensor, ...], prompt: Tensor | None) -> list[tuple[list[int], float]]:
        """Greedy and best sequences without padding, with the scores of these."""
        greedy = decoding.greedy(model, *context, max_length=LENGTH, prompt=prompt)
        best, scores = decoding.beam_search(model, *context, max_length=LENGTH, prompt=prompt, beams=3)
        rows = [[token for token in row if token != PADDING] for row in [*greedy.tolist(), *best.tolist()]]
        return list(zip(rows, [0.0] * len(greedy) + scores.tolist(), strict=True))

    together = results(writer.context, prompt)
    for row in range(3):
        one = slice(row, row + 1)
        alone = results(tuple(x[one] for x in writer.context), None if prompt is None else prompt[one])
        for (tokens, score), (expected, expected_score) in zip(together[row::3], alone, strict=True):
            assert tokens == expected
            assert score == pytest.approx(expected_score, abs=1e-5)


def test_one_beam_is_greedy(writer: Writer) -> None:
    model = writer.trained()
    options = {"max_length": LENGTH, "prompt": writer.prompt}
    best, _ = decoding.beam_search(model, *writer.context, beams=1, **options)
    assert torch.equal(best, decoding.greedy(model, *writer.context, **options))


@pytest.mark.parametrize("length_penalty", [0.0, 0.7])
def test_beams_are_scored_by_their_log_probability(writer: Writer, length_penalty: float) -> None:
    model = writer.trained()
    prompt = writer.prompt
    found, scores = decoding.beam_search(
        model, *writer.context, max_length=LENGTH, prompt=prompt, length_penalty=length_penalty
    )
    inputs, targets = found[:, :-1], found[:, 1:].clone()
    targets[:, : 0 if prompt is None else prompt.shape[1] - 1] = PADDING
    log_probabilities = logits_of(model, writer.context, inputs).log_softmax(-1)
    chosen = log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * (targets != PADDING)
    lengths = (targets != PADDING).sum(1)
    torch.testing.assert_close(scores, chosen.sum(1) / lengths**length_penalty, rtol=0, atol=1e-5)


def test_decoding_drops_nothing_and_leaves_the_mode(writer: Writer) -> None:
    model = writer.trained().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    frozen = next(module for module in model.modules() if module is not model)
    frozen.eval()
    options = {"max_length": LENGTH, "prompt": writer.prompt}
    modes = [module.training for module in model.modules()]
    found = decoding.greedy(model, *writer.context, **options)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(found, decoding.greedy(model.eval(), *writer.context, **options))


@pytest.mark.parametrize("shift", range(7))
def test_beam_search_finds_what_greedy_misses(shift: int) -> None:
    # After token 1 token 3 is likelier than 4, but only 4 is followed by anything certain.
    table = torch.full((7, 7), 1e-9)
    table[1, 3], table[1, 4] = 0.6, 0.4
    table[3, 5], table[3, 6] = 0.5, 0.5
    table[4, 5] = table[5, 2] = table[6, 2] = 1.0
    # At first there is one possible token for two beams. The other beam must not end, wherever the end symbol stands.
    table[0] = torch.eye(7)[1]
    model = Chain(table.roll((shift, shift), (0, 1)), end_index=(END + shift) % 7, padding_index=None)
    options = {"max_length": 8, "prompt": torch.tensor([[shift]])}
    greedy = decoding.greedy(model, **options)
    best, scores = decoding.beam_search(model, beams=2, **options)
    assert (greedy[0, 2] - shift) % 7 == 3
    assert best.tolist() == [[(token + shift) % 7 for token in (0, 1, 4, 5, 2)]]
    assert scores.item() == pytest.approx(math.log(0.4) / 4, abs=1e-5)
    assert scores.item() > math.log(0.6 * 0.5) / 4


@pytest.mark.parametrize("length_penalty", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_enough_beams_search_everything(seed: int, length_penalty: float) -> None:
    table = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)) ** 3
    table[:, :2] = 0  # neither padding nor another start
    table /= table.sum(1, keepdim=True)
    scores = {}
    for length in range(1, 5):
        for tokens in itertools.product([2, 3, 4], repeat=length):
            if END in tokens[:-1] or (tokens[-1] != END and length < 4):
                continue  # goes on after its end, or stops before
            steps = zip((1, *tokens), tokens, strict=False)
            scores[tokens] = sum(math.log(table[a, b]) for a, b in steps) / length**length_penalty
    expected = max(scores, key=lambda tokens: scores[tokens])
    # Of three tokens at most 1 + 2 + 4 beginnings are complete and 8 others: no beam may be lost to an impossible one.
    best, score = decoding.beam_search(
        Chain(table), max_length=5, prompt=torch.tensor([[1]]), beams=15, length_penalty=length_penalty
    )
    assert best.tolist() == [[1, *expected]]
    assert score.item() == pytest.approx(scores[expected], abs=1e-5)


def test_sequences_stop_at_the_end_symbol_and_are_padded() -> None:
    table = torch.zeros(6, 6)
    table[3, 4] = table[4, 2] = table[5, 5] = 1.0  # 3 4 end, 5 for ever
    table[2, 5] = table[0, 5] = 1.0  # nothing that follows the end is asked
    prompt = torch.tensor([[3], [4]])
    expected = [[3, 4, 2], [4, 2, 0]]
    for search in (decoding.greedy, decoding.sample):
        assert search(Chain(table), max_length=20, prompt=prompt).tolist() == expected
        assert search(Chain(table), max_length=4, prompt=torch.tensor([[5]])).tolist() == [[5, 5, 5, 5]]
    best, scores = decoding.beam_search(Chain(table), max_length=20, prompt=prompt)
    assert best.tolist() == expected
    assert scores.tolist() == [0.0, 0.0]


def test_padding_is_never_written_before_the_end() -> None:
    table = torch.tensor([0.7, 0.0, 0.1, 0.2]).expand(4, 4)  # an unlikely end
    options = {"max_length": 6, "prompt": torch.tensor([[3]] * 50)}
    assert decoding.greedy(Chain(table), **options).eq(3).all()
    sampled = decoding.sample(Chain(table), **options)
    is_written = (sampled == END).cumsum(1) - (sampled == END).long() == 0
    assert torch.equal(sampled == PADDING, ~is_written)
    assert bool((sampled == PADDING).any())
    best, scores = decoding.beam_search(Chain(table), beams=2, length_penalty=0.0, **options)
    assert best[0].tolist() == [3, END]
    assert scores[0].item() == pytest.approx(math.log(0.1))  # of all tokens, padding too


def test_samples_repeat_with_their_generator(writer: Writer) -> None:
    model = writer.trained()
    options = {"max_length": LENGTH, "prompt": writer.prompt, "temperature": 2.0}
    first, second, other = (
        decoding.sample(model, *writer.context, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 3, 100])
def test_samples_have_the_models_distribution(temperature: float, top_k: int | None) -> None:
    row = torch.tensor([0.0, 0.42, 0.08, 0.3, 0.2])  # padding is never written
    count = 20_000
    tokens = decoding.sample(
        Chain(row.expand(5, 5)),
        max_length=2,
        prompt=torch.ones(count, 1, dtype=torch.int64),
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(0),
    )
    expected = row ** (1 / temperature)
    expected[row.argsort()[: -(top_k or 5)]] = 0
    expected /= expected.sum()
    found = tokens[:, 1].bincount(minlength=5) / count
    assert bool((found[expected == 0] == 0).all())
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / count)  # four standard deviations, at most


def test_top_1_and_a_low_temperature_are_greedy(writer: Writer) -> None:
    model = writer.trained()
    options = {"max_length": LENGTH, "prompt": writer.prompt}
    expected = decoding.greedy(model, *writer.context, **options)
    assert torch.equal(decoding.sample(model, *writer.context, top_k=1, **options), expected)
    assert torch.equal(decoding.sample(model, *writer.context, temperature=1e-6, **options), expected)


def test_positions_allow_their_number_of_tokens() -> None:
    model = WRITERS["gpt"].build()
    model.end_index = None
    prompt = torch.tensor([[4, 8]])
    assert decoding.greedy(model, max_length=14, prompt=prompt).shape == (1, 14)
    with pytest.raises(ValueError, match="max_length must be at most 14, the model's positions, got 15"):
        decoding.greedy(model, max_length=15, prompt=prompt)
    with pytest.raises(ValueError, match="a sequence has at most 14 positions, got 15"):
        model(torch.ones(1, 15, dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {temperature}"):
        decoding.sample(Chain(torch.eye(3)), max_length=4, prompt=torch.tensor([[1]]), temperature=temperature)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, r"prompt must be \[N, P\] with at least one .* \[2, 0\]"),
        ({"prompt": torch.tensor([1, 2])}, r"prompt must be \[N, P\] with at least one token, got shape \[2\]"),
        ({}, "prompt must be given to CharLM, which begins no sequence by itself"),
        ({"prompt": torch.tensor([[1, 2]]), "max_length": 2}, "max_length must be more than the 2 tokens .*, got 2"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    model = WRITERS["char_lm_lstm"].build()
    for search in (decoding.greedy, decoding.sample, decoding.beam_search):
        with pytest.raises(ValueError, match=message):
            search(model, **{"max_length": 5, **arguments})


def test_counts_less_than_one_are_refused() -> None:
    prompt = torch.tensor([[1]])
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        decoding.sample(Chain(torch.eye(3)), max_length=4, prompt=prompt, top_k=0)
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        decoding.beam_search(Chain(torch.eye(3)), max_length=4, prompt=prompt, beams=0)
