"""Files that are there whole or not at all, and errors of writing that name the file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

# Where a library turns an error of the system into one of its own, the number is left in words like these.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in it become those of writing ``path``, whatever else they name and however they came."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except Exception as error:
        found = SYSTEM_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place for a file that takes ``path`` in one step once it is written, and of which nothing stays otherwise.

    The place is in a folder of its own beside ``path``, since libraries write under further names. What a killed
    process has left there goes first; a link is not followed. Content and name are forced to the disk.

    Raises:
        OSError: it cannot be written; the error names ``path``, which is as it was.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    beside = unfinished / path.name
    with naming(path):
        try:
            remove(unfinished)
            unfinished.mkdir()
            beside.touch()
            permissions = (path if path.is_file() else beside).stat().st_mode
            yield beside
            beside.chmod(permissions)  # some libraries make their files private
            force_to_disk(beside)
            os.replace(beside, path)
            force_to_disk(path.parent)
        finally:
            remove(unfinished)


@contextlib.contextmanager
def output(path: Path) -> Iterator[Path]:
    """:func:`replacing` for a path that the user chose: links are followed, and what is no file is written to as it is.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    if path.is_relative_to("/dev") or (path.exists() and not path.is_file()):
        with naming(path):
            yield path
    else:
        with naming(path), replacing(path.resolve()) as beside:
            yield beside


def write_text(path: Path, text: str) -> None:
    """Writes a text to a path that the user chose, whole or not at all.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    with output(path) as place:
        place.write_text(text, encoding="utf-8")


class Records:
    """A file that records are appended to, each wholly or not at all, by one process at a time.

    Args:
        path: made where there is none.
        keep: bytes of what is there already that stay; all if not given. What is no regular file is left as it is.

    Raises:
        OSError: the file cannot be opened, or another process has it open like this; the error names it.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self.path = path
        with naming(path):
            self._file = path.open("ab", buffering=0)
            try:
                self._regular = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
                if self._regular and not locked(self._file.fileno()):
                    raise OSError(errno.EBUSY, "another run is writing to this file")
                if self._regular and keep is not None:
                    os.truncate(self._file.fileno(), min(keep, self._size()))
            except BaseException:
                self._file.close()
                raise

    def append(self, record: bytes) -> None:
        """Hands the record to the system, so that it outlives the process.

        Raises:
            OSError: there is no room for all of it; the error names the file, and nothing of it stays.
        """
        size = self._size()
        with naming(self.path):
            try:
                while record:
                    record = record[self._file.write(record) :]
            except OSError:
                with contextlib.suppress(OSError):
                    if self._regular:
                        os.truncate(self._file.fileno(), size)
                raise

    def close(self) -> None:
        """Closes the file, for others to open."""
        with naming(self.path):
            self._file.close()

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def locked(descriptor: int) -> bool:
    """Locks a file until it is closed or the process ends, however; false where somebody else has done so.

    Where the file system has no locks nothing is locked, and everybody may go on.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with all in it, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def force_to_disk(path: Path) -> None:
    """Waits until a file, or the entries of a folder, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
