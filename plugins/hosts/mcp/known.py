"""What is in a folder, and the vectors that are known already, by what is in the files; standard
library only.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.media import Kind, Media, sniff
from mlx_onevision.plugins.hosts.mcp.allowed_files import HEAD, Places

SIZE = 64 << 20  # bytes of all vectors; some 10,000 pictures
OVERHEAD = 200  # bytes of an entry beside its value, roughly

Key = tuple[object, ...]


class Known:
    """What was computed last, the longest unused forgotten first. For one thread."""

    def __init__(self, size: int = SIZE) -> None:
        self._most, self._held = size, 0
        self._values: OrderedDict[Key, bytes] = OrderedDict()

    def get(self, key: Key) -> bytes | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: bytes) -> None:
        self._drop(key)
        self._values[key] = value
        self._held += len(value) + OVERHEAD
        while self._held > self._most:
            self._drop(next(iter(self._values)))

    def _drop(self, key: Key) -> None:
        value = self._values.pop(key, None)
        if value is not None:
            self._held -= len(value) + OVERHEAD


@dataclass(frozen=True)
class Seen:
    """A picture or a video of a folder. ``content`` is equal for what has equal vectors."""

    path: str
    kind: Kind
    content: Key

    @property
    def medium(self) -> Media:
        return Media(self.kind, path=self.path)


def look(places: Places, path: str) -> Seen | None:
    """What a file is; None where it is neither a picture nor a video.

    A picture is known by its bytes, wherever it lies. A video may be too large to be read for that,
    so it is known by which file it is, its size, and when it was changed.

    Raises:
        PluginError: for a file that cannot be read.
    """
    file = places.policy.open(Media("video", path=path))
    assert not isinstance(file, bytes)
    try:
        with file:
            head = file.read(HEAD)
            kind = sniff(head)
            if kind is None:
                return None
            status = os.fstat(file.fileno())
            if kind == "video":
                inode = (status.st_dev, status.st_ino, status.st_size)
                return Seen(path, kind, (*inode, status.st_mtime_ns, status.st_ctime_ns))
            if status.st_size > places.policy.size:
                raise PluginError("too_large", "the picture is too large")
            digest = blake2b(head, digest_size=20)
            while piece := file.read(1 << 20):
                digest.update(piece)
            return Seen(path, kind, (digest.digest(),))
    except OSError as error:
        raise PluginError("unsupported_media", f"cannot be read: {error.strerror}") from None


def listed(places: Places, folder: str, recursive: bool, most: int) -> list[str]:
    """The paths of a folder's ordinary files, in order; links and hidden ones are left out.

    Raises:
        PluginError: ``too_large`` for more than ``most``.
    """
    found: list[str] = []
    waiting = [folder]
    while waiting:
        inside = waiting.pop()
        for name, is_folder in _entries(places, inside):
            path = os.path.join(inside, name)
            if not is_folder:
                found.append(path)
            elif recursive:
                waiting.append(path)
            if len(found) + len(waiting) > most:
                raise PluginError(
                    "too_large", f"there are more than {most} files", "name a smaller folder"
                )
    return sorted(found)


def _entries(places: Places, folder: str) -> list[tuple[str, bool]]:
    """Names of files and folders, and which one it is."""
    descriptor = places.policy.open_folder(folder)
    try:
        with os.scandir(descriptor) as entries:
            return [
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not entry.name.startswith(".") and _is_text(entry.name)
                # Links and devices are neither.
                if entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
            ]
    except OSError as error:
        raise PluginError(
            "unsupported_media", f"cannot list {folder!r}: {error.strerror}"
        ) from None
    finally:
        os.close(descriptor)


def _is_text(name: str) -> bool:
    """Whether a name can be told in JSON; others are bytes that stand for no characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
