# pyright: reportUnknownMemberType=false
"""safetensors files, written front to back and flushed: one module's tensors are in memory."""

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Self

import mlx.core as mx

from mlx_onevision.checkpoint.manifest import File
from mlx_onevision.checkpoint.plan import OutputTensor
from mlx_onevision.checkpoint.tensors import SINGLE, written_name
from mlx_onevision.errors import StorageError

DTYPES = {
    "U8": mx.uint8,
    "U32": mx.uint32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
}
CHUNK = 1 << 24  # bytes written at once, and between two looks at Ctrl-C


@dataclass(frozen=True)
class Part:
    """Tensors that are made together: what they are, and how to make them."""

    pieces: tuple[OutputTensor, ...]
    make: Callable[[], Sequence[mx.array]]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be written: its name, and what it is made of."""

    name: str
    parts: tuple[Part, ...]

    @cached_property
    def header(self) -> bytes:
        """The safetensors header, padded so that the data begins at a multiple of 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        at = 0
        for piece in self.pieces:
            entry = {"dtype": piece.dtype, "shape": list(piece.shape)}
            entries[written_name(piece.name)] = entry | {"data_offsets": [at, at + piece.nbytes]}
            at += piece.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def pieces(self) -> Iterator[OutputTensor]:
        return (piece for part in self.parts for piece in part.pieces)

    @property
    def nbytes(self) -> int:
        """Of the file; :attr:`data_bytes` is that of the tensors alone."""
        return len(self.header) + self.data_bytes

    @property
    def data_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def divide(parts: Iterable[Part], most: int) -> list[Shard]:
    """Files of at most ``most`` bytes of tensors, in order, named as mlx-lm and transformers do; a
    module that is larger gets its own.
    """
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [
        Shard(f"model-{n:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for n, group in enumerate(groups, 1)
    ]


def index(shards: Sequence[Shard], values: int) -> bytes:
    """The index of shards, whose weights stand for so many ``values``."""
    names = {written_name(piece.name): shard.name for shard in shards for piece in shard.pieces}
    total = sum(shard.data_bytes for shard in shards)
    content = {
        "metadata": {"total_size": total, "total_parameters": values},
        "weight_map": dict(sorted(names.items())),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def write_shard(folder: Path, shard: Shard, progress: Callable[[int], None]) -> File:
    """Writes one file into a folder, module by module. Raises StorageError when it cannot."""
    with Writer(folder / shard.name, progress) as file:
        file.write(shard.header)
        for part in shard.parts:
            arrays = list(part.make())
            mx.eval(arrays)
            arrays.reverse()
            for piece in part.pieces:
                file.write(_raw(arrays.pop(), piece))
            mx.clear_cache()  # the next module is rarely of the same size
    return file.written


def _raw(array: mx.array, piece: OutputTensor) -> memoryview:
    if array.shape != piece.shape or array.dtype != DTYPES[piece.dtype]:
        raise ValueError(f"{piece.name} is {array.dtype} {array.shape}, planned as {piece}")
    array = mx.contiguous(array if array.ndim else array.reshape(1))
    return memoryview(array.view(mx.uint8)).cast("B")  # pyright: ignore[reportArgumentType]


def open_new(path: Path) -> BinaryIO:
    """Creates a file. Raises OSError, for one that is there as well."""
    return path.open("xb", buffering=0)


class Writer:
    """Writes one new file; ``progress`` is called with how many bytes were just written. Raises
    StorageError, saying which file the system did not write, and why.
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
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
    if sys.platform == "darwin":  # where fsync leaves it in the drive's cache
        with suppress(OSError):  # on a file system that does not have it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk itself. Raises StorageError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            flush(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise failure(folder, error) from error


def failure(path: Path, error: OSError) -> StorageError:
    """The error for a file or folder that the system did not write."""
    reason = error.strerror or str(error)
    return StorageError(f"{path} cannot be written: {reason}; nothing was changed")
