"""Folders of images: the right pixels and classes, and every file that does not belong named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dlkernels import data

image_module = pytest.importorskip("PIL.Image")


HINT = "; an image size fits all"


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        image_module.fromarray(array).save(path, quality=95)
    return path


@pytest.fixture(params=[".png", ".npy"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Training and test images of two classes, the class written into the first pixel."""
    for part, count in (("train", 20), ("test", 5)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                array = picture(number)
                array[0, 0] = label
                put(tmp_path / part / name / f"{number}{request.param}", array)
    (tmp_path / "train" / "cat" / ".hidden").write_text("does not count")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def problem(folder: Path, **options: int) -> str:
    with pytest.raises(data.DataError) as caught:
        data.load(folder, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_classes_are_numbered_in_alphabetical_order(root: Path) -> None:
    found = data.load(root)
    assert isinstance(found, data.ClassifiedImages)
    assert (found.num_classes, found.image_size, found.channels) == (2, 8, 3)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [36, 4, 10]
    for images, labels in (found.train, found.validation, found.test):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert np.array_equal(found.test[0][3].permute(1, 2, 0)[1:], picture(3)[1:])


def test_a_folder_of_classes_alone_is_split_by_the_seed(root: Path) -> None:
    found = data.load(root / "train")
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [29, 3, 8]
    assert not torch.equal(found.test[0], data.load(root / "train", seed=1).test[0])


def test_val_is_for_testing_or_where_both_are_there_for_validation(root: Path) -> None:
    (root / "test").rename(root / "val")
    found = data.load(root)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [36, 4, 10]
    for name in ("cat", "dog"):
        put(root / "test" / name / "0.npy", picture(0))
    found = data.load(root)
    assert [len(part[0]) for part in (found.train, found.validation, found.test)] == [40, 10, 2]


def test_images_of_any_size_are_fitted(root: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the square in the middle
    path = put(root / "test" / "cat" / "00.npy", wide)
    assert problem(root) == f"{path}: the image is 10 x 30 with 3 channels, expected 8 x 8 with 3 channels{HINT}"
    found = data.load(root, image_size=4)
    assert isinstance(found, data.Images)
    assert found.train[0].shape == (36, 3, 4, 4)
    assert (found.test[0] == 200).all((1, 2, 3)).any()
    batch, _ = found.batch(found.train, torch.arange(2))
    assert batch.shape == (2, 3, 4, 4)


def test_jpeg_is_close_to_its_pixels(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, 16, dtype=np.uint8)[:, None, None], (16, 16, 3))
    for name in ("a", "b"):
        for number in range(8):
            put(tmp_path / name / f"{number}.JPG", np.ascontiguousarray(smooth))
    found = data.load(tmp_path)
    assert (found.test[0].int() - torch.tensor(smooth).permute(2, 0, 1).int()).abs().max() <= 6


def test_grey_arrays_have_one_channel(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(8):
            put(tmp_path / name / f"{number}.npy", picture(number)[:, :, 0])
    found = data.load(tmp_path)
    assert isinstance(found, data.Images)
    assert found.channels == 1


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("root", [".png"], indirect=True)
@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("7.png", truncated, "the image cannot be read: "),
        ("7.png", lambda path: path.write_bytes(b""), "the image cannot be read: cannot identify"),
        ("7.png", lambda path: path.write_bytes(b"GIF89a" + bytes(50)), "the image cannot be read: cannot identify"),
        ("a.npy", lambda path: path.write_bytes(b"\x93NUMPY"), "the image cannot be read: "),
        (
            "a.npy",
            lambda path: np.save(path, picture(0)[:4]),
            "the image is 4 x 8 with 3 channels, expected 8 x 8 with",
        ),
        ("a.npy", lambda path: np.save(path, picture(0)[:, :, 0]), "the image is 8 x 8 with 1 channel, expected 8 x 8"),
        ("a.npy", lambda path: np.save(path, picture(0) / 255), "the image cannot be read: it is float64 of shape"),
        ("a.npy", lambda path: np.save(path, picture(0)[:0]), "the image cannot be read: it has no pixels"),
        (
            "a.npy",
            lambda path: np.save(path, np.array([{"a": 1}]), allow_pickle=True),
            "the image cannot be read: Object arrays cannot be loaded when allow_pickle=False",
        ),
        (
            "notes.txt",
            lambda path: path.write_text("cats"),
            "expected an image; its name must end in .png, .jpg, .jpeg",
        ),
        ("nested", lambda path: path.mkdir(), "expected an image"),
    ],
)
def test_what_is_no_image_is_named(root: Path, name: str, damage, words: str) -> None:  # type: ignore[no-untyped-def]
    path = root / "train" / "dog" / name
    damage(path)
    assert problem(root).startswith(f"{path}: {words}")


def test_folders_that_do_not_fit_are_named(root: Path, tmp_path: Path) -> None:
    (root / "test" / "dog").rename(root / "test" / "fox")
    assert problem(root) == f"{root / 'test'}: has the classes cat, fox; expected cat, dog"
    (root / "train" / "owl").mkdir()
    assert problem(root / "train") == f"{root / 'train' / 'owl'}: there is no image in this folder"
    (root / "test").rename(root / "unknown")
    assert problem(root).startswith(str(root))
    assert "expected a folder of images for each class, found 0" in problem(root / "train" / "owl")


def test_a_missing_test_part_is_named(root: Path) -> None:
    (root / "test").rename(root / "unknown")
    assert problem(root) == f"{root}: there is a folder 'train', but neither 'test' nor 'val'"


def test_parts_of_different_sizes_are_named(root: Path) -> None:
    for path in (root / "test").rglob("*.*"):
        put(path, picture(0, 6, 6))
    assert problem(root) == (
        f"{root / 'test'}: the images are 6 x 6 with 3 channels, expected 8 x 8 with 3 channels, as in train"
    )
    assert len(data.load(root, image_size=6).test[0]) == 10
