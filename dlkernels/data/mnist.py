"""MNIST and its relatives (Fashion-MNIST, KMNIST) in their official files, plain or through gzip.

An IDX file is a header of big-endian 32-bit integers and then bytes, the last dimension running fastest. The first
integer is 2048 (unsigned bytes) plus the number of dimensions, the others are the dimensions (LeCun et al., the site of
MNIST).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from .files import DataError, open_data
from .sets import ClassifiedImages, Columns, classified_images

PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
NUM_CLASSES = 10
UNSIGNED_BYTES = 2048


def is_mnist(folder: Path) -> bool:
    """Whether one of the official files is there."""
    names = [name for part in PARTS.values() for name in part]
    return any((folder / (name + suffix)).exists() for name in names for suffix in ("", ".gz"))


def load_mnist(folder: Path, seed: int = 0) -> ClassifiedImages:
    """The four files of ``folder``; ``seed`` draws the validation examples.

    Raises:
        DataError: a file is missing or not as it should be.
    """
    return classified_images(read_part(folder, "train"), read_part(folder, "test"), NUM_CLASSES, seed)


def read_part(folder: Path, part: str) -> Columns:
    """Images, uint8 ``[N, 1, S, S]``, and labels, int64 ``[N]``, of ``"train"`` or ``"test"``."""
    images_path, labels_path = (find(folder, name) for name in PARTS[part])
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if images.shape[1] != images.shape[2]:
        raise DataError(images_path, f"images must be square, got {images.shape[1]} x {images.shape[2]}", offset=8)
    if len(labels) != len(images):
        raise DataError(labels_path, f"there are {len(images)} images, but {len(labels)} labels", offset=4)
    wrong = (labels >= NUM_CLASSES).nonzero()
    if len(wrong) > 0:
        index = int(wrong[0])
        problem = f"label {int(labels[index])} of image {index} is not in 0 to {NUM_CLASSES - 1}"
        raise DataError(labels_path, problem, offset=8 + index)
    return images.unsqueeze(1), labels.long()


def find(folder: Path, name: str) -> Path:
    """The file called ``name`` in ``folder``, or its gzip."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise DataError(folder / name, "the file is missing, and so is its .gz")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The array of bytes in ``path``, uint8.

    Raises:
        DataError: the file is no IDX file of bytes with so many dimensions, is empty, truncated or too long.
    """
    with open_data(path) as file:
        (magic,) = struct.unpack(">I", file.exactly(4, "the magic number"))
        if magic != UNSIGNED_BYTES + dimensions:
            problem = f"the magic number is {magic}, expected {UNSIGNED_BYTES + dimensions}"
            raise file.error(f"{problem} for bytes of {dimensions} dimensions", offset=0)
        sizes = struct.unpack(f">{dimensions}I", file.exactly(4 * dimensions, "the dimensions"))
        for dimension, size in enumerate(sizes):
            if size == 0:
                raise file.error(f"dimension {dimension} is 0", offset=4 + 4 * dimension)
        body = file.exactly(math.prod(sizes), f"{' x '.join(map(str, sizes))} bytes")
        file.end()
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(sizes)
