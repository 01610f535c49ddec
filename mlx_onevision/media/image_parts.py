"""The parts of an image's file that its pixels need, and the orientation by its EXIF.

An untrusted file may have a million parts, which Pillow would read one by one, or a directory of
metadata whose entries all name the same megabyte. PNG, JPEG and GIF files are therefore reduced, in
one quick and bounded pass, to what the pixels of the first frame need, before Pillow opens them.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import BinaryIO, NamedTuple

from mlx_onevision.errors import MediaError

MAX_PARTS = 50_000  # chunks, segments or blocks; libpng writes one for each 8 KB of pixels
MAX_EXIF = 1 << 16  # bytes; a JPEG has no longer one
MAX_SCANS = 100  # of a JPEG, each over all pixels; the usual progressive file has 10
MAX_FRAMES = 1_000  # of an animation, or pages; of which an image is the first alone

ICON = b"\0\0\1\0"  # the first bytes of an ICO
_PNG = b"\x89PNG\r\n\x1a\n"
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT")
_ORIENTATION = 0x0112
_NUMBERS = {1: "B", 3: "H", 4: "I"}  # a TIFF's types of whole numbers: byte, short, long
_MARKER = re.compile(rb"\xff([^\xff])", re.DOTALL)  # of a JPEG; what lies between is skipped
_SCANNED = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # a marker that ends a scan's coded data
_BLOCK = re.compile(rb"[!,;]")  # how a GIF's begin
_SOS, _EOI = 0xDA, 0xD9


class Parts(NamedTuple):
    """A reduced file.

    data : a file of the same pixels.
    exif : the block of EXIF that was left out, empty where there was none; None for a file of
        another kind, which is as it was.
    extra : bytes that decoding holds for each pixel, beside the pixel itself.
    """

    data: bytes
    exif: bytes | None
    extra: int


def kind_of(head: bytes) -> str:
    """Pillow's name for the kind of a file that begins so; "" for all but the usual ones."""
    if head.startswith(_PNG):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    # Others are compressed, and Pillow decompresses them in Python.
    if head.startswith(b"BM") and head[30:34] in (b"\0\0\0\0", b"\3\0\0\0"):
        return "BMP"
    return ""


def reduced(data: bytes, name: str, extra: int = 0) -> Parts:
    """A PNG, JPEG or GIF reduced; another file as it is. Damage is left for Pillow to report.

    name : what errors call it. extra : as in :class:`Parts`, for another kind of file.

    Raises:
        MediaError: for more than ``MAX_PARTS`` of them, or ``MAX_FRAMES`` frames.
    """
    reduce = {"PNG": _png, "JPEG": _jpeg, "GIF": _gif}.get(kind_of(data[:64]))
    return Parts(data, None, extra) if reduce is None else reduce(data, name)


def _png(data: bytes, name: str) -> Parts:
    """Keeps the critical chunks and the transparent colour; adds an end where it is missing."""
    kept, exif = [_PNG], b""
    count, frames, place, kind = 0, 0, len(_PNG), b""
    while place + 8 <= len(data) and kind != b"IEND":  # behind which there may be anything
        count = _counted(count, name)
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind in _CRITICAL:
            kept.append(data[place:end])
            if end > len(data):  # cut short, and to be refused: without an end
                break
        elif kind == b"fcTL":
            check_frames(frames := frames + 1, name)
        elif kind in (b"tRNS", b"eXIf") and length < MAX_EXIF:
            content = data[place + 8 : end - 4]
            if data[end - 4 : end] == zlib.crc32(kind + content).to_bytes(4, "big"):
                if kind == b"eXIf":
                    exif = exif or content
                else:
                    kept.append(data[place:end])
        place = end
    else:
        kept.append(_END)
    return Parts(b"".join(kept), exif, 0)


def _jpeg(data: bytes, name: str) -> Parts:
    """Keeps the segments up to the first scan except comments and those of applications; JFIF's and
    Adobe's stay, since they say what the colours are. All from there to the image's end stays;
    behind it, phones append a video.

    Raises:
        MediaError: for more than ``MAX_SCANS`` scans, too.
    """
    kept, exif = [data[:2]], b""
    count, place, rest, progressive, scans = 0, 2, b"", False, 0
    while (found := _MARKER.search(data, place)) is not None:
        count = _counted(count, name)
        start, marker, place = found.end() - 2, found[1][0], found.end()
        if marker in (_EOI, _SOS):  # the end, or the first scan and all that follows
            scans, end = _scans(data, start, name)
            rest = data[start:end]
            break
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # they stand alone
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        if length < 2:
            raise MediaError(f"{name} is damaged: a segment has no length")
        place += length
        segment = data[start:place]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[10:]
        progressive = progressive or marker in (0xC2, 0xC6, 0xCA, 0xCE)
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
    if scans > MAX_SCANS:
        raise MediaError(f"{name} has {scans:,} scans, more than {MAX_SCANS}; save it anew")
    # With several scans the decoder holds all coefficients until the last, 6 bytes a pixel, and
    # frees them before the 3 bytes a pixel of RGB are made.
    extra = 3 if progressive or scans > 1 else 0
    return Parts(b"".join((*kept, rest)), exif, extra)


def _scans(data: bytes, place: int, name: str) -> tuple[int, int]:
    """The number of a JPEG's scans from ``place``, where the first begins, and where it ends."""
    scans, count = 0, 0
    while (found := _SCANNED.search(data, place)) is not None:
        count = _counted(count, name)
        marker, place = found[1][0], found.end()
        if marker == _EOI:
            return scans, place
        scans += marker == _SOS
        # Of a lower marker the decoder skips nothing, so what follows it could be scans.
        if marker >= 0xC0:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return scans, len(data)


def _gif(data: bytes, name: str) -> Parts:
    """Keeps the header, the last control block before the first frame, which names the transparent
    colour, and all from that frame on, which Pillow reads only as far as the frame goes.
    """
    place = 13 + _colours(data[10:11])
    kept, control, count = data[:place], b"", 0
    while (found := _BLOCK.search(data, place)) is not None:
        count = _counted(count, name)
        start, place = found.start(), found.end()
        if found[0] != b"!":  # an image, or the end
            _check_gif_frames(data, start, name)
            return Parts(kept + control + data[start:], b"", 0)
        label, place = data[place : place + 1], place + 1
        while size := (data[place : place + 1] or b"\0")[0]:
            count = _counted(count, name)
            place += 1 + size
        place += 1
        if label == b"\xf9":
            control = data[start:place]
    return Parts(kept + control, b"", 0)


def _check_gif_frames(data: bytes, place: int, name: str) -> None:
    """Counts the frames of a GIF from ``place``, where the first begins."""
    frames = 0
    while (block := data[place : place + 1]) in (b",", b"!"):
        if block == b",":
            check_frames(frames := frames + 1, name)
            place += 11 + _colours(data[place + 9 : place + 10])  # and the size of its codes
        else:
            place += 2
        while place < len(data) and (size := data[place]):
            place += 1 + size
        place += 1


def _colours(flags: bytes) -> int:
    """Bytes of the table of colours that follows a GIF's or a frame's header with these flags."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def check_frames(count: int, name: str) -> None:
    """Raises MediaError for more than ``MAX_FRAMES``, which are no image."""
    if count > MAX_FRAMES:
        raise MediaError(
            f"{name} has more than {MAX_FRAMES:,} frames or pages, of which an image is the first; "
            "save that one as a file"
        )


def check_pages(file: BinaryIO, name: str) -> None:
    """As :func:`check_frames`, of a TIFF, whose directories are followed and not read. Damage is
    left for Pillow to report.
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:1] == b"I" else ">"
    big = head[2:4] in (b"+\0", b"\0+")  # BigTIFF, whose numbers have 8 bytes
    number, count, entry = (f"{order}Q",) * 2 + (20,) if big else (f"{order}I", f"{order}H", 12)
    place = head[8:16] if big else head[4:8]
    pages, size, width = 0, struct.calcsize(number), struct.calcsize(count)
    with suppress(OSError, OverflowError, struct.error):
        while start := struct.unpack(number, place)[0]:
            check_frames(pages := pages + 1, name)
            file.seek(start)
            entries = struct.unpack(count, file.read(width))[0]
            file.seek(start + width + entry * entries)
            place = file.read(size)


def icon_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Height and width in pixels of each image in an ICO, by their own headers, since its directory
    has at most 256. Pillow decodes one of them as it opens the file.
    """
    file.seek(4)
    count = int.from_bytes(file.read(2), "little")
    places = [entry[12:16] for entry in iter(partial(file.read, 16), b"")][:count]
    for place in places:
        file.seek(int.from_bytes(place, "little"))
        head = file.read(24)
        if head.startswith(_PNG) and len(head) == 24:
            wide, high = struct.unpack_from(">II", head, 16)
            yield high, wide
        elif head[:4] == b"\x0c\0\0\0" and len(head) == 24:
            wide, high = struct.unpack_from("<HH", head, 4)
            yield high // 2, wide  # with its mask
        elif len(head) == 24:
            wide, high = struct.unpack_from("<ii", head, 4)
            yield abs(high) // 2, abs(wide)


def _counted(count: int, name: str) -> int:
    """The number of parts with one more. Raises MediaError beyond ``MAX_PARTS``."""
    if count >= MAX_PARTS:
        raise MediaError(f"{name} is in more than {MAX_PARTS:,} parts; save it anew")
    return count + 1


def orientation(exif: bytes) -> int:
    """The orientation 1 to 8 by a block of EXIF; 1 where it has none, or is damaged."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    try:
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", exif, place)
            if tag == _ORIENTATION:
                number = _NUMBERS[kind]
                return struct.unpack_from(order + number, exif, place + 8)[0] if count == 1 else 1
    except (struct.error, KeyError):
        pass
    return 1
