"""Texts and vocabularies, the synthetic sets, and what is found by which name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlkernels import data
from dlkernels.data import END, PADDING, START, UNKNOWN, Vocabulary
from dlkernels.data.text import python_text, text_windows


@given(st.text())
def test_characters_come_back(text: str) -> None:
    vocabulary = Vocabulary.of_text(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary) == 4 + len(set(text))


def test_words_come_back_without_their_spaces() -> None:
    vocabulary = Vocabulary.of_text("The cat,  the hat.\nThe end", "word")
    numbers = vocabulary.encode("The hat,\nthe cat")
    assert vocabulary.decode(numbers) == "The hat , \n the cat"
    assert vocabulary.encode("The dog").tolist()[1] == UNKNOWN


def test_a_vocabulary_keeps_the_most_frequent() -> None:
    vocabulary = Vocabulary.of_text("b b b a a c c d", "word", limit=3)
    assert vocabulary.symbols[4:] == ("a", "b", "c")
    assert vocabulary.symbols[:4] == ("<padding>", "<start>", "<end>", "<unknown>")


def test_windows_cover_the_text_and_predict_its_next_tokens() -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(1000))
    found = text_windows(text, length=9)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [89, 10, 11]
    tokens, targets = found.batch(found.train, torch.arange(89))
    assert tokens.shape == targets.shape == (89, 9)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    # Every window continues the alphabet, and the windows of both parts start nine letters apart, all once.
    assert ((targets - tokens) % 26 == 1).all()
    starts = [text[start : start + 10] for start in range(0, 891, 9)]
    both = torch.cat([found.train[0], found.validation[0]])
    assert sorted(found.vocabulary.decode(window) for window in both) == sorted(starts)
    assert found.vocabulary.decode(found.test[0][0]) == text[900:910]


def test_the_vocabulary_knows_nothing_of_the_test_part() -> None:
    found = text_windows("ab" * 450 + "z" * 100, length=9)
    assert "z" not in found.vocabulary.symbols
    assert (found.test[0] == UNKNOWN).all()


def test_a_file_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "book"
    path.write_text("grüße, 世界! " * 100, encoding="utf-8")
    found = data.load(path, "text", length=10)
    assert isinstance(found, data.Text)
    assert set("grüße, 世界!") < set(found.vocabulary.symbols)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "offset 0: the file is empty"),
        (b"a" * 700 + b"\xff" + b"b" * 700, "offset 700: this is not UTF-8: invalid start byte"),
        ("é".encode() * 500 + b"\xc3", "offset 1000: this is not UTF-8: unexpected end of data"),
    ],
)
def test_a_damaged_text_is_named_with_its_offset(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(data.DataError) as caught:
        data.load(path, "text")
    assert str(caught.value) == f"{path}, {words}"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("abc" * 100, {"tokens": "byte"}, "tokens must be character or word, got 'byte'"),
        ("abc" * 100, {"length": 0}, "length must be positive, got 0"),
        ("abc" * 100, {"length": 64}, "a part of the text has 30 tokens, too few for a window of 64 and one more"),
    ],
)
def test_windows_that_cannot_be_are_refused(text: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_windows(text, **options)  # type: ignore[arg-type]


def test_the_text_that_ships_with_python_is_real() -> None:
    text = python_text()
    assert len(text) > 100_000
    assert 'The "if" statement is used for conditional execution' in text
    assert text == python_text()


def test_pairs_are_copies_or_reversals() -> None:
    found = data.load("synthetic", "pairs")
    assert isinstance(found, data.SequencePairs)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [1800, 200, 400]
    orders = set()
    for source, target in zip(*found.test, strict=True):
        assert target[0] == START
        order, *letters = found.vocabulary.decode(source[source != PADDING]).split()
        answer = found.vocabulary.decode(target[(target != PADDING) & (target != START) & (target != END)]).split()
        assert target[1 + len(letters)] == END
        assert answer == (letters if order == "copy" else letters[::-1])
        orders.add(order)
    assert orders == {"copy", "reverse"}


def colours_in(image: torch.Tensor) -> set[str]:
    """The colours of the pixels of a scene, its noise removed."""
    bright = (image > 128).flatten(1).t().unique(dim=0)
    names = {(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 0): "yellow"}
    return {names[tuple(colour)] for colour in bright.int().tolist() if any(colour)}  # type: ignore[index]


def test_captions_tell_the_colours_to_be_seen() -> None:
    found = data.load("synthetic", "captions", image_size=16)
    assert isinstance(found, data.CaptionedImages)
    words = [found.vocabulary.decode(caption[caption != PADDING]).split() for caption in found.test[1]]
    for image, caption in zip(found.test[0], words, strict=True):
        assert caption[0] == "<start>" and caption[-1] == "<end>"
        assert {word for word in caption if word in ("red", "green", "blue", "yellow")} == colours_in(image)
    assert {len(caption) for caption in words} == {5, 9}


def test_questions_have_the_answer_to_be_seen() -> None:
    found = data.load("synthetic", "questions", image_size=16)
    assert isinstance(found, data.QuestionedImages)
    seen = set()
    for image, question, number in zip(*found.test, strict=True):
        answer = found.answers[number]
        words = found.vocabulary.decode(question[question != PADDING]).split()
        seen.add(" ".join(words[:2]))
        if words[:2] == ["what", "colour"]:
            assert answer in colours_in(image)
        elif words[:2] == ["what", "shape"]:
            assert answer in ("square", "circle", "triangle")
            assert words[4] in colours_in(image)
        else:
            assert answer in ("yes", "no")
    assert seen == {"what colour", "what shape", "is there"}


def test_shapes_are_what_they_are_called() -> None:
    from dlkernels.data.synthetic import mask

    square, circle, triangle = (mask(shape, 32).float() for shape in ("square", "circle", "triangle"))
    assert torch.equal(square, square.t()) and torch.equal(circle, circle.t())
    assert square.sum() > circle.sum() > triangle.sum() > 0.1 * 32**2
    widths = triangle.sum(1)
    assert (widths.diff()[:26] >= 0).all() and widths[4] < widths[24]


@pytest.mark.parametrize(("kind", "source"), [("images", "synthetic"), ("captions", "synthetic"), ("images", "digits")])
def test_images_come_in_any_size_and_the_seed_draws_them(kind: str, source: str) -> None:
    first, again, other = (data.load(source, kind, seed=seed, image_size=12) for seed in (0, 0, 1))
    assert isinstance(first, data.Images)
    images = first.batch(first.train, torch.arange(5))[0]
    assert images.shape == (5, first.channels, 12, 12)
    assert first.checksum() == again.checksum() != other.checksum()


def test_noisy_patterns_can_be_told_apart() -> None:
    found = data.load("synthetic", image_size=8)
    assert isinstance(found, data.ClassifiedImages)
    (images, labels), (test_images, test_labels) = found.train, found.test
    means = torch.stack([images[labels == label].float().mean(0) for label in range(10)])
    distances = (test_images.float().unsqueeze(1) - means).square().flatten(2).sum(2)
    assert (distances.argmin(1) == test_labels).float().mean() > 0.95
    assert images.float().std(0).mean() > 10  # not the patterns themselves


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        (
            "mnist",
            "images",
            "there is no data called 'mnist' here; images can be loaded from digits or synthetic or a path",
        ),
        ("synthetic", "text", "there is no data called 'synthetic' here; text can be loaded from text or a path"),
        (".", "pairs", "there is no data called '.' here; pairs can be loaded from synthetic"),
        ("digits", "sounds", "kind must be one of images, text, pairs, captions, questions, got 'sounds'"),
    ],
)
def test_unknown_sources_are_named(source: str, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data.load(source, kind)


def test_a_file_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match="expected a folder of images"):
        data.load(tmp_path / "file")


def test_too_few_examples_for_three_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 examples are too few to set 10% of them aside"):
        data.sets.split_off((torch.zeros(2),), 0.1, 0)
