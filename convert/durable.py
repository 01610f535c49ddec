"""Files that are on the disk when they are done, with the hash of what was written into them."""

import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from mlx_onevision.checkpoint.manifest import File
from mlx_onevision.errors import StorageError

CHUNK = 1 << 24  # bytes written at once, and between two looks at Ctrl-C


def open_new(path: Path) -> BinaryIO:
    """A file that is not there yet, unbuffered."""
    return path.open("xb", buffering=0)


class Writer:
    """Writes one new file. ``progress`` is called with how many bytes were just written.

    Raises:
        StorageError: saying which file the system did not write, and why.
    """

    def __init__(self, path: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        self.path = path
        self._progress = progress
        self._digest = sha256()
        self._size = 0
        try:
            self._file = open_new(path)
        except OSError as error:
            raise failure(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                flush(self._file.fileno())
        except OSError as error:
            raise failure(self.path, error) from error
        finally:
            self._file.close()

    @property
    def written(self) -> File:
        """Size and hash of what has been written."""
        return File(self._size, self._digest.hexdigest())

    def write(self, data: bytes | memoryview) -> None:
        """Appends ``data``, all of it."""
        view = memoryview(data)
        while len(view):
            try:
                count = self._file.write(view[:CHUNK])
            except OSError as error:
                raise failure(self.path, error) from error
            self._digest.update(view[:count])
            self._size += count
            self._progress(count)
            view = view[count:]


def flush(descriptor: int) -> None:
    """Waits until a file or folder is on the disk itself."""
    import fcntl

    if sys.platform == "darwin":  # where fsync leaves it in the drive's cache
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a file system that does not have it
            pass
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Waits until a folder's list of names is on the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            flush(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise failure(folder, error) from error


def failure(path: Path, error: OSError) -> StorageError:
    """What to tell a person about a file or folder that could not be written."""
    reason = error.strerror or str(error)
    return StorageError(f"{path} cannot be written: {reason}; nothing was changed")
