"""Files: what their first bytes say of images and videos, JSON objects from untrusted folders,
files that are replaced as a whole, files that one of several processes has for itself, and the
folder of caches.

Standard library only: the plugins' contract imports it, too.
"""

import fcntl
import json
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn, cast

from mlx_onevision.errors import CheckpointError

# The list of a 72B model's tensors has 0.2 MB. Parsed, a byte may take 25.
MAX_JSON_BYTES = 4_000_000
MAX_BOXES = 1000  # of an MP4 file that are looked at
LFS_POINTER = b"version https://git-lfs"
SNIFF_BYTES = 32  # of a file's beginning; ``sniff`` needs no more to tell an image from a video

# Major brands of ISO media files ("ftyp") that are images or image sequences; others are videos.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
AVIF_BRANDS = (b"avif", b"avis")


def sniff(data: bytes) -> Literal["image", "video"] | None:
    """Whether a file begins as an image or as a video; None where it begins as neither.

    data : its first ``SNIFF_BYTES``, or more.

    An animation that the image reader takes (GIF, AVIF or HEIF
    sequences) is an image. Types that are guessed from a name are often wrong: HEIC images are
    widely taken for videos.
    """
    if data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image"
    if data[:6] in (b"GIF87a", b"GIF89a") or data[:4] in (b"II*\0", b"MM\0*", b"qoif"):
        return "image"
    if data[:2] == b"BM" and data[6:10] == b"\0\0\0\0":
        return "image"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image"
    if data[4:8] == b"ftyp" and data[8:12] in (*HEIF_BRANDS, *AVIF_BRANDS):
        return "image"
    if data[:4] == b"\x1aE\xdf\xa3" or (data[:4] == b"RIFF" and data[8:12] == b"AVI "):
        return "video"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "video"
    if data[:4] in (b"\0\0\x01\xba", b"OggS") or _is_mpeg_ts(data) or _is_mpeg_ts(data[4:]):
        return "video"
    return None


def _is_mpeg_ts(data: bytes) -> bool:
    """Whether it begins with a packet of an MPEG transport stream (ISO 13818-1) that starts a unit,
    has a payload and is not scrambled. In an M2TS, four bytes of time stand before each packet.
    """
    return len(data) > 3 and data[:1] == b"G" and data[1] & 0xE0 == 0x40 and data[3] & 0xD0 == 0x10


def seconds_of_mp4(file: BinaryIO) -> float | None:
    """How many seconds an MP4 or QuickTime file lasts by its header (ISO 14496-12, ``mvhd``); None
    for another file, and where the header does not say. A few bytes are read, nothing is decoded.
    """
    end, boxes = file.seek(0, os.SEEK_END), 0
    place = 0
    while place + 8 <= end and boxes < MAX_BOXES:
        boxes += 1
        file.seek(place)
        head = file.read(16)
        size, kind, start = int.from_bytes(head[:4], "big"), head[4:8], place + 8
        if size == 1:  # 64 bits of size follow the kind
            size, start = int.from_bytes(head[8:], "big"), place + 16
        stop = place + size if size else end
        if (place == 0 and kind != b"ftyp") or stop < start:
            return None
        if kind == b"mvhd":
            file.seek(start)
            header = file.read(32)
            is_64_bit = header[:1] == b"\1"  # version 1 has 64-bit times and durations
            timescale, first = (header[20:24], 24) if is_64_bit else (header[12:16], 16)
            duration = int.from_bytes(header[first : first + (8 if is_64_bit else 4)], "big")
            return duration / max(int.from_bytes(timescale, "big"), 1) or None
        place = start if kind == b"moov" else stop
    return None


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises:
        CheckpointError: naming the file, when it has more than ``most`` bytes, is not JSON in UTF-8
            (NaN and Infinity are not JSON), or does not hold an object.
    """

    def constant(name: str) -> NoReturn:
        raise ValueError(name)

    try:
        status = path.stat()
        if status.st_size > most:
            raise CheckpointError(f"{path.name} is larger than {most} bytes")
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise CheckpointError(f"{path.name} is not a regular file")
        value: object = json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        refuse_lfs_pointer(path)
        raise CheckpointError(f"{path.name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object")
    return cast(dict[str, Any], value)  # JSON's keys are strings


def refuse_lfs_pointer(path: Path) -> None:
    """CheckpointError where Git LFS has left a pointer in place of a file."""
    try:
        with path.open("rb") as file:
            found = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return
    if found:
        raise CheckpointError(
            f"{path.name} is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"
        )


def claim(path: Path) -> BinaryIO | None:
    """Opens and locks a file for this process alone; None while another holds the lock. A file that
    is not there is created, readable by its owner only; a link is not followed. The lock ends when
    the file is closed, and when the process ends, however it ends.

    Raises:
        OSError: where it cannot be opened, and on a disk without locks.
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.fdopen(os.open(path, flags, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # the holder before has removed or replaced it meanwhile


@contextmanager
def replacing(path: Path, private: bool = False) -> Generator[BinaryIO]:
    """A file to write, which replaces ``path`` at the end, complete and flushed to the disk. Where
    an error ends the block, what was there stays as it is. Until then the file has a random name in
    the same folder, which nobody can guess and prepare.

    private : whether only its owner may read it.

    Raises:
        OSError: where it cannot be written; it names ``path``.
    """
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:  # around the opening, too: a signal may end it once the file is there
        with os.fdopen(os.open(partial, flags, 0o600 if private else 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # The error of a write names no file, others the random name.
        if isinstance(error, OSError) and error.filename in (None, partial, str(partial)):
            error.filename = str(path)
        raise


def save(path: Path, text: str) -> None:
    """Writes a text file, or leaves the one that was there as it is.

    Raises:
        OSError: where it cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode())


def cache_folder(kind: str) -> Path:
    """Where what is done is kept: ``mlx-onevision/KIND`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "mlx-onevision" / kind
