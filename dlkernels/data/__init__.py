"""Data sets: read from files in their official layouts, taken from packages that ship them, or made here.

:func:`load` finds the reader by a name or by what lies in a path. Whatever is damaged is an error that names file and
offset before training starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .cifar import find_layout, load_cifar
from .digits import Split, digit_images, load_digits, shuffled_batches
from .files import DataError
from .image_folder import load_image_folder
from .mnist import is_mnist, load_mnist
from .sets import CaptionedImages, ClassifiedImages, DataSet, Images, QuestionedImages, SequencePairs, Text
from .synthetic import synthetic_captions, synthetic_images, synthetic_pairs, synthetic_questions
from .text import python_text, read_text, text_windows
from .vocabulary import END, PADDING, START, UNKNOWN, Vocabulary

__all__ = [
    "END",
    "PADDING",
    "START",
    "UNKNOWN",
    "CaptionedImages",
    "ClassifiedImages",
    "DataError",
    "DataSet",
    "Images",
    "QuestionedImages",
    "SequencePairs",
    "Split",
    "Text",
    "Vocabulary",
    "load",
    "load_cifar",
    "load_digits",
    "load_image_folder",
    "load_mnist",
    "shuffled_batches",
    "sources",
]


@dataclass(frozen=True)
class Options:
    """What :func:`load` was asked for besides the source."""

    seed: int
    image_size: int | None
    tokens: str
    length: int


def images_at(path: Path, options: Options) -> ClassifiedImages:
    """Whatever images are in a folder."""
    if not path.is_dir():
        raise DataError(path, "expected a folder of images")
    if is_mnist(path):
        return load_mnist(path, options.seed)
    if find_layout(path) is not None:
        return load_cifar(path, options.seed)
    return load_image_folder(path, options.seed, options.image_size)


def text_at(path: Path, options: Options) -> Text:
    """The text in a file."""
    return text_windows(read_text(path), options.seed, options.tokens, options.length)


# What each kind of data can be loaded from: names, and what a path is for.
NAMED: dict[str, dict[str, Callable[[Options], DataSet]]] = {
    "images": {
        "digits": lambda options: digit_images(options.seed),
        "synthetic": lambda options: synthetic_images(options.seed, options.image_size or 32),
    },
    "text": {"text": lambda options: text_windows(python_text(), options.seed, options.tokens, options.length)},
    "pairs": {"synthetic": lambda options: synthetic_pairs(options.seed)},
    "captions": {"synthetic": lambda options: synthetic_captions(options.seed, options.image_size or 32)},
    "questions": {"synthetic": lambda options: synthetic_questions(options.seed, options.image_size or 32)},
}
AT_PATH: dict[str, tuple[Callable[[Path, Options], DataSet], str]] = {
    "images": (images_at, "the folder of MNIST, CIFAR-10 or CIFAR-100, or one with a folder of images for each class"),
    "text": (text_at, "a text file in UTF-8"),
}


def load(
    source: str | Path,
    kind: str = "images",
    *,
    seed: int = 0,
    image_size: int | None = None,
    tokens: str = "character",
    length: int = 64,
) -> DataSet:
    """The data set called ``source`` or, of images and text, the one at that path.

    Args:
        source: ``"digits"``, ``"text"``, ``"synthetic"`` or a path.
        kind: what the examples are: ``"images"`` with their classes, ``"text"``, ``"pairs"`` of sequences,
            ``"captions"`` of images or ``"questions"`` about images.
        seed: draws the examples that are set aside, and whatever is synthetic.
        image_size: height and width of images in a batch; that of the data if not given.
        tokens: what a text is split into, ``"character"`` or ``"word"``.
        length: tokens in a window of a text.

    Raises:
        DataError: a file is missing, damaged or mislabelled; the message names it and, where it can, the offset.
        ModuleNotFoundError: scikit-learn (for the digits) or Pillow (for PNG and JPEG) is not installed.
        ValueError: there is no such kind, or no such source of this kind; the message says what there is.
    """
    if kind not in NAMED:
        raise ValueError(f"kind must be one of {', '.join(NAMED)}, got {kind!r}")
    options = Options(seed, image_size, tokens, length)
    if str(source) in NAMED[kind]:
        found = NAMED[kind][str(source)](options)
    elif kind in AT_PATH and Path(source).exists():
        found = AT_PATH[kind][0](Path(source), options)
    else:
        raise ValueError(f"there is no data called {str(source)!r} here; {kind} can be loaded from {sources(kind)}")
    if isinstance(found, Images) and image_size is not None:
        found = replace(found, image_size=image_size)
    return found


def sources(kind: str) -> str:
    """What data of this kind can be loaded from, in words."""
    names = list(NAMED[kind])
    if kind in AT_PATH:
        names.append(f"a path ({AT_PATH[kind][1]})")
    return " or ".join(names)
