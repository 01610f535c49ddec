"""A cache of the tiles of images and videos, by the contents that they were made from.

Every turn of a conversation brings its media again. Neither a file's name nor its time of change
identifies its contents, so the bytes are hashed, which takes a fraction of decoding and resizing.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from hashlib import sha256
from threading import Lock
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.media.parallel import parallel_map

MAX_HASHED = 256 << 20  # bytes of a file; a larger one is decoded anew
_CHUNK = 4 << 20
_PIECE = 1 << 19  # bytes that one core hashes at a time; another size makes other keys


class Tiled(Protocol):
    """A prepared image or video: ``tiles`` are uint8 (n, S, S, 3)."""

    @property
    def tiles(self) -> NDArray[np.uint8]: ...


Value = TypeVar("Value", bound=Tiled)


class TileCache:
    """The images and videos that were used last, at most ``capacity`` bytes of tiles. From any
    thread.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._values: OrderedDict[Hashable, Tiled] = OrderedDict()
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return sum(value.tiles.nbytes for value in self._values.values())

    def get(self, key: Hashable | None, kind: type[Value]) -> Value | None:
        """The value of this ``kind`` under ``key``, else None; the key None is never there."""
        with self._lock:
            value = self._values.get(key)
            if not isinstance(value, kind):
                return None
            self._values.move_to_end(key)
            return value

    def put(self, key: Hashable | None, value: Tiled) -> None:
        """Keeps ``value``, its tiles now read-only, unless it is larger than ``capacity``."""
        if key is None or value.tiles.nbytes > self.capacity:
            return
        value.tiles.flags.writeable = False
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while self.nbytes > self.capacity:
                self._values.popitem(last=False)


def digest_of(array: NDArray[Any]) -> bytes:
    """A hash of an array's bytes in order: the SHA-256, for which processors have instructions, of
    the SHA-256 of its pieces, which several cores compute.
    """
    whole = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
    return sha256(
        b"".join(parallel_map(lambda piece: sha256(piece.data).digest(), pieces))
    ).digest()


def array_key(array: NDArray[Any]) -> Hashable | None:
    """A key, equal for arrays of equal shape, type and values; None for one of objects."""
    if array.dtype.hasobject:
        return None
    return "array", array.shape, array.dtype.str, digest_of(array)


def file_key(file: BinaryIO, check: Callable[[], None]) -> Hashable | None:
    """A key that is equal for open files of equal contents; None beyond ``MAX_HASHED`` bytes.

    check : called between reads; ends the work by raising.
    """
    if os.fstat(file.fileno()).st_size > MAX_HASHED:
        return None
    digest, at = sha256(), 0
    while chunk := os.pread(file.fileno(), _CHUNK, at):
        check()
        digest.update(chunk)
        at += len(chunk)
    return "file", digest.digest()
