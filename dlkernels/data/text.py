"""Texts as windows of characters or words: a file of one's own, or what ships with CPython."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from .files import DataError, content_of
from .sets import Text, three_parts
from .vocabulary import TOKENS, Vocabulary

TEST_SHARE = 0.1


def python_text() -> str:
    """The licence of CPython and its reference documentation of keywords and types, as far as they are installed."""
    from pydoc_data.topics import topics

    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    texts = [licence.read_text(encoding="utf-8")] if licence.exists() else []
    return "\n".join([*texts, *(topics[name] for name in sorted(topics))])


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: it is empty or not UTF-8; the message gives the offset.
    """
    content = content_of(path)
    if not content:
        raise DataError(path, "the file is empty", offset=0)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(path, f"this is not UTF-8: {error.reason}", offset=error.start) from None


def text_windows(text: str, seed: int = 0, tokens: str = "character", length: int = 64) -> Text:
    """``text`` cut into windows of ``length`` + 1 tokens: the last of each is the first of the next.

    The last tenth is for testing and has no part in the vocabulary; ``seed`` draws the windows for validation.

    Args:
        tokens: ``"character"`` or ``"word"``.

    Raises:
        ValueError: ``tokens`` is something else, ``length`` is not positive, or the text is too short for three parts.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be {' or '.join(TOKENS)}, got {tokens!r}")
    if length < 1:
        raise ValueError(f"length must be positive, got {length}")
    cut = round((1 - TEST_SHARE) * len(text))
    vocabulary = Vocabulary.of_text(text[:cut], tokens)
    parts = []
    for part in (text[:cut], text[cut:]):
        numbers = vocabulary.encode(part).int()
        if len(numbers) <= length:
            raise ValueError(
                f"a part of the text has {len(numbers)} tokens, too few for a window of {length} and one more"
            )
        parts.append(numbers.unfold(0, length + 1, length))  # [N, length + 1]
    return Text(vocabulary=vocabulary, **three_parts((parts[0],), (parts[1],), seed))
