"""IDX files: what they hold, and every kind of damage named with file and offset."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlkernels import data
from dlkernels.data.mnist import PARTS, read_idx

NAMES = [name for part in PARTS.values() for name in part]
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = NAMES


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def images_and_labels(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 6, 6)), np.arange(count) % 10


@pytest.fixture(params=["", ".gz"], ids=["plain", "gzip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The four official files with a few images of 6 x 6 pixels."""
    for part, count in (("train", 40), ("test", 10)):
        for name, array in zip(PARTS[part], images_and_labels(count), strict=True):
            write(tmp_path, name + request.param, idx(array))
    return tmp_path


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def change(folder: Path, name: str, change) -> Path:  # type: ignore[no-untyped-def]
    """Changes the unpacked bytes of a file; gives its path."""
    (path,) = folder.glob(f"{name}*")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    write(folder, path.name, change(content))
    return path


def problem(folder: Path) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(folder)
    return str(caught.value)


def test_images_and_labels_are_read(folder: Path) -> None:
    found = data.load(folder, seed=3)
    assert isinstance(found, data.ClassifiedImages)
    assert (found.num_classes, found.image_size, found.channels) == (10, 6, 1)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [36, 4, 10]
    images, labels = images_and_labels(10)
    assert np.array_equal(found.test[0].squeeze(1), images)
    assert np.array_equal(found.test[1], labels)
    # Each training example is there once, with its own label.
    images, labels = images_and_labels(40)
    expected = {image.tobytes(): label for image, label in zip(images.astype(np.uint8), labels, strict=True)}
    for part in (found.train, found.validation):
        for image, label in zip(*part, strict=True):
            assert expected.pop(image.numpy().tobytes()) == label
    assert not expected


def test_normalisation_is_that_of_the_training_part(folder: Path) -> None:
    found = data.load(folder)
    assert isinstance(found, data.Images)
    images, _ = found.batch(found.train, torch.arange(36))
    assert images.mean().abs() < 1e-6
    assert images.std(correction=0) == pytest.approx(1, abs=1e-6)
    others, _ = found.batch(found.test, torch.arange(10))
    assert others.mean().abs() > 1e-3


def test_the_seed_draws_the_validation_part(folder: Path) -> None:
    first, again, other = (data.load(folder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.validation[0], again.validation[0])
    assert not torch.equal(first.validation[0], other.validation[0])
    assert first.checksum() == again.checksum() != other.checksum()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (TRAIN_IMAGES, lambda old: b"\0\0\x08\x01" + old[4:], "offset 0: the magic number is 2049, expected 2051"),
        (TEST_LABELS, lambda old: b"PK\x03\x04" + old[4:], "offset 0: the magic number is 1347093252, expected 2049"),
        (TRAIN_IMAGES, lambda old: old[:3], "offset 3: the file ends here, 1 bytes before the end of the magic"),
        (TRAIN_IMAGES, lambda old: old[:9], "offset 9: the file ends here, 7 bytes before the end of the dimensions"),
        (TRAIN_IMAGES, lambda old: old[:-5], "offset 1451: the file ends here, 5 bytes before the end of 40 x 6 x 6"),
        (TRAIN_IMAGES, lambda old: old + b"\0", "offset 1456: the file should end here, and goes on"),
        (TRAIN_IMAGES, lambda old: old[:4] + b"\xff" * 4 + old[8:], "offset 1456: the file ends here"),
        (TRAIN_IMAGES, lambda old: old[:8] + b"\0" * 4 + old[12:], "offset 8: dimension 1 is 0"),
        (TEST_IMAGES, lambda old: old[:8] + struct.pack(">2I", 4, 9) + old[16:], "offset 8: images must be square"),
        (TRAIN_LABELS, lambda old: old[:15] + b"\x0a" + old[16:], "offset 15: label 10 of image 7 is not in 0 to 9"),
        (TRAIN_LABELS, lambda old: idx(np.zeros(39)), "offset 4: there are 40 images, but 39 labels"),
    ],
)
def test_damage_is_named_with_file_and_offset(folder: Path, name: str, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    path = change(folder, name, damage)
    assert problem(folder).startswith(f"{path}, {words}")


def test_a_missing_file_is_named(folder: Path) -> None:
    (path,) = folder.glob(f"{TEST_LABELS}*")
    path.unlink()
    assert problem(folder) == f"{folder / TEST_LABELS}: the file is missing, and so is its .gz"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda packed: packed[:60], "the file does not unpack: Compressed file ended"),
        (lambda packed: packed[:40] + bytes([packed[40] ^ 255]) + packed[41:], "the file does not unpack"),
        (lambda packed: b"nonsense" + packed, "offset 0: the file does not unpack: Not a gzipped file"),
        (lambda packed: packed[:-8] + b"\0" * 8, "the file does not unpack: CRC check failed"),
    ],
)
def test_a_damaged_gzip_is_named(damage, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / f"{TRAIN_LABELS}.gz"
    path.write_bytes(damage(gzip.compress(idx(np.random.default_rng(0).integers(0, 10, 500)))))
    with pytest.raises(data.DataError, match=words) as caught:
        read_idx(path, 1)
    assert str(caught.value).startswith(f"{path}, offset ")


def test_a_header_that_promises_too_much_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / TRAIN_IMAGES
    path.write_bytes(struct.pack(">4I", 2051, 2**31, 2**15, 2**15))
    with pytest.raises(data.DataError, match="offset 16: the file ends here"):
        read_idx(path, 3)


def array_or_problem(path: Path) -> torch.Tensor | str:
    try:
        return read_idx(path, 1)
    except data.DataError as error:
        return str(error)


@given(st.binary(max_size=40))
def test_no_bytes_are_anything_but_an_array_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(b"\0\0\x08\x01" + content)
    found = array_or_problem(path)
    if isinstance(found, str):
        assert found.startswith(f"{path}, offset ")
    else:
        assert path.read_bytes() == idx(found.numpy())
