"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their official files, the binary ones and those for Python.

A binary file is a sequence of records: the label (CIFAR-100: that of 20 coarse classes, then that of 100 fine ones),
and 1024 bytes each of red, green and blue, row by row. A file for Python is a pickle of a dictionary with the same rows
and labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .byte_arrays import read_pickle
from .files import DataError, content_of
from .sets import ClassifiedImages, Columns, classified_images

SIZE = 32
PIXELS = 3 * SIZE * SIZE


@dataclass(frozen=True)
class Layout:
    """The files of one edition. Of several labels the last is the one to learn."""

    train: tuple[str, ...]
    test: str
    labels: dict[bytes, int]  # names in the files for Python, with the number of classes

    @property
    def num_classes(self) -> int:
        return [*self.labels.values()][-1]


CIFAR10 = {b"labels": 10}
CIFAR100 = {b"coarse_labels": 20, b"fine_labels": 100}
LAYOUTS = (
    Layout(tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin", CIFAR10),
    Layout(tuple(f"data_batch_{number}" for number in range(1, 6)), "test_batch", CIFAR10),
    Layout(("train.bin",), "test.bin", CIFAR100),
    Layout(("train",), "test", CIFAR100),
)


def find_layout(folder: Path) -> Layout | None:
    """The edition of which a file is in ``folder``."""
    found = (layout for layout in LAYOUTS if any((folder / name).is_file() for name in (*layout.train, layout.test)))
    return next(found, None)


def load_cifar(folder: Path, seed: int = 0) -> ClassifiedImages:
    """The training and test files of ``folder``; ``seed`` draws the validation examples. Nothing in them is executed.

    Raises:
        DataError: a file is missing or not as it should be.
    """
    layout = find_layout(folder)
    if layout is None:
        raise DataError(folder, "none of the files of CIFAR-10 or CIFAR-100 is there")
    parts = [read_file(folder / name, layout.labels) for name in (*layout.train, layout.test)]
    images, labels = (torch.cat(column) for column in zip(*parts[:-1], strict=True))
    return classified_images((images, labels), parts[-1], layout.num_classes, seed)


def read_file(path: Path, label_names: dict[bytes, int]) -> Columns:
    """Images, uint8 ``[N, 3, 32, 32]``, and labels, int64 ``[N]``, of one file of either edition."""
    if not path.exists():
        raise DataError(path, "the file is missing")
    pixels, labels = read_records(path, label_names) if path.suffix == ".bin" else read_rows(path, label_names)
    images = torch.from_numpy(pixels.copy()).view(-1, 3, SIZE, SIZE)
    return images, torch.from_numpy(labels.astype(np.int64))


def read_records(path: Path, label_names: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[N, 3072]`` and labels ``[N]`` of a binary file."""
    content = np.frombuffer(content_of(path), np.uint8)
    length = len(label_names) + PIXELS
    count, rest = divmod(len(content), length)
    if rest or not count:
        problem = f"a record has {length} bytes, and the last one {rest}" if rest else "the file is empty"
        raise DataError(path, problem, offset=count * length)
    records = content.reshape(count, length)
    for column, num_classes in enumerate(label_names.values()):
        check_labels(path, records[:, column], num_classes, offset=column, stride=length)
    return records[:, len(label_names) :], records[:, len(label_names) - 1]


def read_rows(path: Path, label_names: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[N, 3072]`` and labels ``[N]`` of a file for Python."""
    content = read_pickle(path)
    pixels = content.get(b"data")
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        raise DataError(path, f"'data' is {describe(pixels)}, expected an array of rows of {PIXELS} bytes")
    for name, num_classes in label_names.items():
        labels = content.get(name)
        if not isinstance(labels, list) or len(labels) != len(pixels):
            expected = f"expected a list of {len(pixels)}, one for each row of 'data'"
            raise DataError(path, f"{name.decode()!r} is {describe(labels)}, {expected}")
        if any(type(label) is not int for label in labels):
            raise DataError(path, f"{name.decode()!r} has something other than integers")
        check_labels(path, np.array(labels, dtype=object), num_classes)
    return pixels, np.array(labels)


def describe(value: Any) -> str:
    """What was found, for an error message."""
    if value is None:
        return "missing"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list) else "")


def check_labels(path: Path, labels: np.ndarray, num_classes: int, offset: int | None = None, stride: int = 0) -> None:
    """Raises a :class:`DataError` about the first label outside [0, num_classes); the offset is that of the first."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        index = int(wrong[0])
        problem = f"label {labels[index]} of image {index} is not in 0 to {num_classes - 1}"
        raise DataError(path, problem, None if offset is None else offset + index * stride)
