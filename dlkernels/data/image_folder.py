"""Images in folders named after their classes: PNG and JPEG through Pillow, arrays in ``.npy`` files through numpy.

Either ``root/train/CLASS/FILE`` beside ``root/test/CLASS/FILE`` (or ``val``, as ImageNet has it; where both are there,
``val`` is for validation), or ``root/CLASS/FILE``, of which test examples are then drawn. Classes are numbered in
alphabetical order. All images are read into memory, as bytes, before training starts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import DataError, check_file
from .sets import TEST_SHARE, ClassifiedImages, Columns, classified_images, resized, split_off, unit

PILLOW_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
SUFFIXES = (*PILLOW_FORMATS, ".npy")


def load_image_folder(folder: Path, seed: int = 0, image_size: int | None = None) -> ClassifiedImages:
    """The images under ``folder``; ``seed`` draws those for validation and, where they are not apart, for testing.

    Args:
        image_size: height and width that every image gets: the square in its middle is resized. If not given, all
            images must have one size and be square.

    Raises:
        DataError: a file is no image or cannot be read, images differ in size or channels, or a class has none.
        ModuleNotFoundError: there are PNG or JPEG files, and Pillow is not installed.
    """
    classes = class_names(folder / "train" if (folder / "train").is_dir() else folder)
    if not (folder / "train").is_dir():
        everything = read_classes(folder, classes, image_size)
        train, test = split_off(everything, TEST_SHARE, seed)
        return classified_images(train, test, len(classes), seed)
    parts = {
        name: read_classes(folder / name, classes, image_size)
        for name in ("train", "val", "test")
        if (folder / name).is_dir()
    }
    if len(parts) == 1:
        raise DataError(folder, "there is a folder 'train', but neither 'test' nor 'val'")
    for name, (images, _) in parts.items():
        if images.shape[1:] != parts["train"][0].shape[1:]:
            expected = f"expected {describe(parts['train'][0][0])}, as in train"
            raise DataError(folder / name, f"the images are {describe(images[0])}, {expected}")
    validation = parts.pop("val") if len(parts) == 3 else None
    train, test = parts.values()
    return classified_images(train, test, len(classes), seed, validation)


def class_names(folder: Path) -> list[str]:
    """The folders in ``folder``, in alphabetical order. Hidden ones do not count."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise DataError(folder, f"expected a folder of images for each class, found {len(names)}")
    return names


def read_classes(folder: Path, classes: list[str], image_size: int | None) -> Columns:
    """Images, uint8 ``[N, C, S, S]``, and labels, int64 ``[N]``, of the folders ``classes`` in ``folder``."""
    if class_names(folder) != classes:
        raise DataError(folder, f"has the classes {', '.join(class_names(folder))}; expected {', '.join(classes)}")
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).iterdir() if not path.name.startswith("."))
        if not paths:
            raise DataError(folder / name, "there is no image in this folder")
        for path in paths:
            image = read_image(path)
            image = fitted(image, image_size) if image_size is not None else image
            if image.shape[1] != image.shape[2] or (images and image.shape != images[0].shape):
                expected = describe(images[0]) if images else "a square"
                raise DataError(path, f"the image is {describe(image)}, expected {expected}; an image size fits all")
            images.append(image)
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def read_image(path: Path) -> Tensor:
    """The image in ``path``, uint8 ``[C, H, W]``; PNG and JPEG have three channels, whatever the file has."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(path, f"expected an image; its name must end in {', '.join(SUFFIXES)}")
    check_file(path)
    try:
        array = read_array(path) if path.suffix.lower() == ".npy" else read_picture(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # decoders raise anything for a file that is damaged
        raise DataError(path, f"the image cannot be read: {error}") from None
    return torch.from_numpy(array)


def read_array(path: Path) -> np.ndarray:
    array = np.load(path, allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        expected = "expected uint8 of shape [H, W], [H, W, 1] or [H, W, 3]"
        raise ValueError(f"it is {array.dtype} of shape {list(array.shape)}, {expected}")
    if array.size == 0:
        raise ValueError(f"it has no pixels: its shape is {list(array.shape)}")
    array = array.reshape(*array.shape[:2], -1)  # [H, W, C]
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def read_picture(path: Path) -> np.ndarray:
    from PIL import Image

    # Only these decoders: another format behind the name would reach code that nobody asked for.
    with Image.open(path, formats=sorted(set(PILLOW_FORMATS.values()))) as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def fitted(image: Tensor, size: int) -> Tensor:
    """The square in the middle of ``image``, resized to ``size``."""
    _, height, width = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square
    return (255 * resized(unit(square.unsqueeze(0)), size)).round().to(torch.uint8).squeeze(0)


def describe(image: Tensor) -> str:
    """Its size, for an error message."""
    channels, height, width = image.shape
    return f"{height} x {width} with {channels} channel{'s' if channels > 1 else ''}"
