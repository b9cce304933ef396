"""CIFAR-10 and CIFAR-100 in both editions; no pickle gets to run anything, and every kind of damage is named."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlkernels import data
from dlkernels.data.byte_arrays import read_pickle

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
RECORD = 3073


def pixels_and_labels(count: int, seed: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), generator.integers(0, num_classes, count)


class OfPython2(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what Python 2 wrote: every text is a string of bytes, and so are the elements of an array."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: bytes | str) -> None:
        value = value.encode() if isinstance(value, str) else value
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_text


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    OfPython2(file, protocol=2).dump(content)
    return file.getvalue()


@pytest.fixture(params=["python", "binary"])
def cifar10(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for seed, name in enumerate(BATCHES):
        pixels, labels = pixels_and_labels(8, seed, 10)
        if request.param == "binary":
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {
                b"batch_label": b"some",
                b"labels": labels.tolist(),
                b"data": pixels,
                b"filenames": [b"a.png"] * 8,
            }
            (tmp_path / name).write_bytes(pickled(content))
    (tmp_path / "batches.meta").write_bytes(b"not read")
    return tmp_path


@pytest.fixture(params=["python", "binary"])
def cifar100(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for seed, name in enumerate(("train", "test")):
        pixels, fine = pixels_and_labels(20, seed, 100)
        coarse = fine // 5
        if request.param == "binary":
            records = np.concatenate([coarse[:, None], fine[:, None], pixels], axis=1).astype(np.uint8)
            (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {b"coarse_labels": coarse.tolist(), b"fine_labels": fine.tolist(), b"data": pixels}
            (tmp_path / name).write_bytes(pickled(content))
    return tmp_path


def problem(folder: Path) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(folder)
    return str(caught.value)


def test_cifar10_is_read(cifar10: Path) -> None:
    found = data.load(cifar10)
    assert isinstance(found, data.ClassifiedImages)
    assert (found.num_classes, found.image_size, found.channels) == (10, 32, 3)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [36, 4, 8]
    pixels, labels = pixels_and_labels(8, 5, 10)
    assert np.array_equal(found.test[0].flatten(1), pixels)
    assert np.array_equal(found.test[1], labels)
    every = np.concatenate([pixels_and_labels(8, seed, 10)[0] for seed in range(5)])
    there = torch.cat([found.train[0], found.validation[0]]).flatten(1).numpy()
    assert sorted(map(bytes, there)) == sorted(map(bytes, every))


def test_cifar100_is_read_with_its_fine_labels(cifar100: Path) -> None:
    found = data.load(cifar100)
    assert isinstance(found, data.ClassifiedImages)
    assert found.num_classes == 100
    pixels, fine = pixels_and_labels(20, 1, 100)
    assert np.array_equal(found.test[0].flatten(1), pixels)
    assert np.array_equal(found.test[1], fine)


@pytest.mark.parametrize("cifar10", ["binary"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda old: old[:-1], f"offset {7 * RECORD}: a record has 3073 bytes, and the last one 3072"),
        (lambda old: old + b"\0\0", f"offset {8 * RECORD}: a record has 3073 bytes, and the last one 2"),
        (lambda old: b"", "offset 0: the file is empty"),
        (
            lambda old: old[: 3 * RECORD] + b"\x0a" + old[3 * RECORD + 1 :],
            f"offset {3 * RECORD}: label 10 of image 3 is",
        ),
    ],
)
def test_damaged_records_are_named(cifar10: Path, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    path = cifar10 / "data_batch_4.bin"
    path.write_bytes(damage(path.read_bytes()))
    assert problem(cifar10).startswith(f"{path}, {words}")


@pytest.mark.parametrize("cifar100", ["binary"], indirect=True)
@pytest.mark.parametrize(("column", "label", "highest"), [(0, 20, 19), (1, 100, 99)])
def test_both_labels_of_cifar100_are_checked(cifar100: Path, column: int, label: int, highest: int) -> None:
    path = cifar100 / "test.bin"
    content = bytearray(path.read_bytes())
    content[2 * 3074 + column] = label
    path.write_bytes(content)
    expected = f"{path}, offset {2 * 3074 + column}: label {label} of image 2 is not in 0 to {highest}"
    assert problem(cifar100) == expected


def test_a_missing_file_is_named(cifar10: Path) -> None:
    (path,) = cifar10.glob("data_batch_3*")
    path.unlink()
    assert problem(cifar10) == f"{path}: the file is missing"


def rows(**changes: Any) -> dict[bytes, Any]:
    pixels, labels = pixels_and_labels(8, 0, 10)
    content = {b"data": pixels, b"labels": labels.tolist()}
    return {**content, **{name.encode(): value for name, value in changes.items()}}


class Exploit:
    """What a hostile pickle does: a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("cifar10", ["python"], indirect=True)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (rows(data=None), "'data' is missing, expected an array of rows of 3072 bytes"),
        (rows(data=np.zeros((8, 3000), np.uint8)), "'data' is an array of shape (8, 3000), expected"),
        (rows(data=np.zeros((0, 3072), np.uint8)), "'data' is an array of shape (0, 3072), expected"),
        (rows(data=np.zeros((8, 3072), np.float32)), "an array has elements of type b'f4', expected bytes"),
        (rows(data=np.array([None])), "an array has elements of type b'O8', expected bytes"),
        (rows(labels=[1] * 7), "'labels' is a list of 7, expected a list of 8, one for each row"),
        (rows(labels=[1] * 7 + [10]), "label 10 of image 7 is not in 0 to 9"),
        (rows(labels=[-1] * 8), "label -1 of image 0 is not in 0 to 9"),
        (rows(labels=[2**70] * 8), f"label {2**70} of image 0 is not in 0 to 9"),
        (rows(labels=[1] * 7 + [True]), "'labels' has something other than integers"),
        ({b"data": rows()[b"data"]}, "'labels' is missing"),
        ([1, 2], "expected a dictionary, got list"),
    ],
)
def test_wrong_contents_are_named(cifar10: Path, content: Any, words: str) -> None:
    path = cifar10 / "data_batch_2"
    path.write_bytes(pickled(content))
    assert problem(cifar10).startswith(str(path))
    assert words in problem(cifar10)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda old: old[: len(old) // 2], "this pickle cannot be read"),
        (lambda old: old + b"\0", "the pickle ends here, and the file goes on"),
        (lambda old: b"", "offset 0: this pickle cannot be read: Ran out of input"),
        (lambda old: b"\x80\xff" + old[2:], "offset 2: this pickle cannot be read: unsupported pickle protocol: 255"),
    ],
)
def test_a_damaged_pickle_is_named(damage, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "data_batch_1"
    path.write_bytes(damage(pickled(rows())))
    with pytest.raises(data.DataError, match=words) as caught:
        read_pickle(path)
    assert str(caught.value).startswith(f"{path}, offset ")


def test_what_numpy_writes_today_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    for array in (np.arange(6, dtype=np.uint8).reshape(2, 3), np.asfortranarray(np.ones((3, 2), np.uint8)) * 7):
        path.write_bytes(pickle.dumps({b"data": array}, protocol=4))
        assert np.array_equal(read_pickle(path)[b"data"], array)


@pytest.mark.parametrize(
    "function", [print, eval, exec, open, getattr, np.load, np.frombuffer, np.zeros, torch.load, io.open_code, Path]
)
def test_no_function_that_a_pickle_names_is_called(function: Any, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Exploit(function, str(marker), "w")}, protocol=2))
    with pytest.raises(data.DataError, match="which is not allowed"):
        read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_no_class_is_set_up_by_a_pickle(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    for value in (Exploit(exec, "raise SystemExit"), Path("x"), torch.nn.Linear(1, 1), ValueError("x")):
        path.write_bytes(pickle.dumps({b"data": value}, protocol=protocol))
        with pytest.raises(data.DataError, match="which is not allowed"):
            read_pickle(path)


def content_or_problem(path: Path) -> dict[bytes, Any] | str:
    try:
        return read_pickle(path)
    except data.DataError as error:
        return str(error)


@given(st.binary(max_size=60), st.integers(0, 400))
def test_no_bytes_within_a_pickle_do_more_than_an_error(
    tmp_path_factory: pytest.TempPathFactory, piece: bytes, place: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    whole = pickled({b"data": np.zeros((2, 40), np.uint8), b"labels": [1, 2]})
    place %= len(whole)
    path.write_bytes(whole[:place] + piece + whole[place + len(piece) :])
    found = content_or_problem(path)
    assert isinstance(found, dict) or found.startswith(f"{path}")
