"""What the readers of files share: the error that names file and offset, and reading just what a header promised."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 20


class DataError(ValueError):
    """A file is not what its data set needs. The message names the file and, where it is known, the offset in bytes."""

    def __init__(self, path: Path, problem: str, offset: int | None = None) -> None:
        where = str(path) if offset is None else f"{path}, offset {offset}"
        super().__init__(f"{where}: {problem}")


class Reader:
    """Reads a file forwards, plain or through gzip (a name that ends in ``.gz``). Offsets are of the unpacked bytes."""

    def __init__(self, path: Path, file: BinaryIO | gzip.GzipFile) -> None:
        self.path = path
        self.offset = 0
        self._file = file

    def error(self, problem: str, offset: int | None = None) -> DataError:
        """The error to raise about the byte at ``offset``, or at the next one to be read."""
        return DataError(self.path, problem, self.offset if offset is None else offset)

    def exactly(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes, which are ``what``. Memory grows with what the file holds, not with what it claims.

        Raises:
            DataError: the file ends before, or does not unpack.
        """
        start, pieces = self.offset, []
        while (missing := start + count - self.offset) > 0:
            piece = self._read(min(CHUNK, missing))
            if not piece:
                raise self.error(f"the file ends here, {missing} bytes before the end of {what}")
            pieces.append(piece)
            self.offset += len(piece)
        return b"".join(pieces)

    def end(self) -> None:
        """Checks that nothing follows.

        Raises:
            DataError: something does.
        """
        if self._read(1):
            raise self.error("the file should end here, and goes on")

    def _read(self, count: int) -> bytes:
        try:
            return self._file.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self.error(f"the file does not unpack: {error}") from None


def content_of(path: Path) -> bytes:
    """All that a file holds.

    Raises:
        DataError: it is none, but a folder, a pipe or a device, which may never end.
    """
    check_file(path)
    return path.read_bytes()


def check_file(path: Path) -> None:
    """Raises a :class:`DataError` where ``path`` is no file, but a folder, a pipe or a device, which may never end."""
    if not path.is_file():
        raise DataError(path, "expected a file")


@contextmanager
def open_data(path: Path) -> Iterator[Reader]:
    """A :class:`Reader` of ``path``."""
    check_file(path)
    with path.open("rb") as file:
        yield Reader(path, gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file)
