"""Images that are damaged, too large or something else: one sentence, or their sound pixels."""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import (
    noise,
    objects,
    png,
    png_of,
    recorded,
    saved,
    smooth,
)
from PIL import Image
from videos import counting

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media import image as module
from mlx_onevision.media.image import (
    load_image,
)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)),
        Image.fromarray(np.full((3, 4), np.nan, np.float32)),
        Image.fromarray(np.full((3, 4), -1, np.int32)),
        Image.fromarray(np.full((3, 4), 65536, np.int32)),
    ],
    ids=["0 to 1", "NaN", "negative", "more than 16 bits"],
)
def test_values_of_no_known_range_are_refused(image: Image.Image) -> None:
    with pytest.raises(MediaError, match=r"has values from .*; scale them to 0\.\.255"):
        load_image(image)
    if image.mode == "F":
        refuse(saved(image, "TIFF"), r"has values from .*; scale them to 0\.\.255")


def spoilt(data: bytes, start: bytes, new: bytes, last: bool = False) -> bytes:
    """The file with other bytes from where it has ``start``."""
    place = data.rindex(start) if last else data.index(start)
    return data[:place] + new + data[place + len(new) :]


def chunked(data: bytes, kind: bytes, content: bytes, sound: bool = True) -> bytes:
    """A PNG with one more chunk before its pixels."""
    place = data.index(b"IDAT") - 4
    check = zlib.crc32(kind + content) ^ (not sound)
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
    return data[:place] + chunk + data[place:]


def with_exif(kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = "a picture"
    return saved(Image.fromarray(smooth(48, 64)), kind, exif=exif, **options)


PLAIN = png(Image.fromarray(smooth(48, 64)))
DAMAGED_METADATA: dict[str, Callable[[], bytes]] = {
    "jpeg, no TIFF": lambda: spoilt(with_exif("JPEG"), b"MM\0*", b"XX\0*"),
    "jpeg, no directory": lambda: spoilt(with_exif("JPEG"), b"MM\0*", b"MM\0*\xff\xff\xff\xff"),
    "webp": lambda: spoilt(with_exif("WEBP", lossless=True), b"MM\0*", b"MM\xf0*"),
    "avif": lambda: spoilt(with_exif("AVIF"), b"MM\0*", b"XX\0*"),
    "png, exif": lambda: chunked(PLAIN, b"eXIf", b"\0\x08\0\x02"),
    "png, text": lambda: chunked(PLAIN, b"tEXt", b"Title\0a picture", sound=False),
    "png, much text": lambda: chunked(PLAIN, b"zTXt", b"Title\0\0" + zlib.compress(bytes(1 << 21))),
    "png, profile": lambda: chunked(PLAIN, b"iCCP", b"ICC\0\0" + zlib.compress(bytes(1 << 21))),
    "png, no profile": lambda: chunked(PLAIN, b"iCCP", b"ICC\0\0nothing"),
    "png, profile's sum": lambda: chunked(PLAIN, b"iCCP", b"ICC\0\0", sound=False),
    "png, cut in its end": lambda: PLAIN[:-6],
    "png, without its end": lambda: PLAIN[:-12],
}


@pytest.mark.parametrize("name", DAMAGED_METADATA)
@pytest.mark.filterwarnings("error")
def test_sound_pixels_are_read_whatever_the_metadata(name: str) -> None:
    kind = name.partition(",")[0].upper()
    options = {"lossless": True} if kind == "WEBP" else {}
    expected = load_image(saved(Image.fromarray(smooth(48, 64)), kind, **options))
    assert np.array_equal(load_image(DAMAGED_METADATA[name]()), expected)


@pytest.mark.parametrize("cut", [17, 30, 60])
def test_missing_pixels_are_damage_whatever_comes_behind_them(cut: int) -> None:
    """A chunk of pixels left out or cut short, with and without an end."""
    refuse(PLAIN[: -12 - cut], "is damaged")
    place = PLAIN.index(b"IDAT")
    data = PLAIN[place + 4 : -16 - cut]
    check = struct.pack(">I", zlib.crc32(b"IDAT" + data))
    short = PLAIN[: place - 4] + struct.pack(">I", len(data)) + b"IDAT" + data + check
    refuse(short, "is damaged")
    refuse(short + PLAIN[-12:], "is damaged")


def test_what_is_no_image_says_what_it_is_or_which_kinds_are() -> None:
    refuse(counting(2), "is a video, not an image; give it as a video")
    refuse(counting(2, "mkv"), "is a video, not an image; give it as a video")
    refuse(b"%PDF-1.7 " + bytes(40), r"of the kinds that are read \(JPEG, .*HEIC\)")


def test_only_pictures_are_opened() -> None:
    """Pillow hands an EPS to Ghostscript; this package does not hand it to Pillow."""
    file = BytesIO()
    Image.fromarray(noise(6, 7, 3)).save(file, "EPS")
    refuse(file.getvalue(), "is not an image of the kinds that are read")


def test_a_broken_orientation_is_no_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 17
    assert np.array_equal(
        load_image(png(objects()["RGB"], exif=exif)), np.asarray(objects()["RGB"])
    )


# Files that are no pictures


def refuse(source: Any, words: str, kind: type[MediaError] = MediaError, **options: Any) -> None:
    with pytest.raises(kind, match=words) as caught:
        load_image(source, **options)
    message = str(caught.value)
    assert not message.endswith(".") and "\n" not in message and len(message) < 400
    assert type(caught.value) is kind


def test_bad_files_get_one_sentence_that_names_them(tmp_path: Path) -> None:
    whole = png(Image.fromarray(noise(64, 64, 3)))
    jpeg = recorded()["file/jpeg 4:4:4"].tobytes()
    bad: dict[str, tuple[bytes, str]] = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"not an image at all", "is not an image"),
        "half.png": (whole[: len(whole) // 2], "is damaged"),
        "head.png": (whole[:20], "Truncated"),
        "crc.png": (whole[:60] + b"\xff" + whole[61:], "is damaged"),
        "half.jpg": (jpeg[:-200], "is damaged"),
        "strip.png": (png_of(1, 2_000_000), "2000000x1 pixels"),
        "none.png": (png_of(0, 4), "cannot read|is not an image|no pixels"),
        "zip.png": (b"PK\x03\x04" + bytes(60), "is not an image"),
    }
    for name, (data, words) in bad.items():
        path = tmp_path / name
        path.write_bytes(data)
        kind = TooLargeError if name == "strip.png" else MediaError
        refuse(path, f"{name}.*({words})", kind)
        refuse(str(path), f"{name}.*({words})", kind)
        refuse(data, f"the image given as bytes.*({words})", kind)
    refuse(tmp_path, "is a folder")
    refuse(tmp_path / "missing.png", r"missing\.png' does not exist")
    refuse("", "is not the path of an image")
    refuse("a\0b", "is not the path of an image")
    refuse("x" * 5000 + ".png", "File name too long")


def test_bad_base64() -> None:
    refuse("data:image/png;base64,????", "data:image/png.*is not valid base64")
    refuse("data:image/svg+xml,%3Csvg%3E", "is not a base64 data URI")
    refuse("data:image/png;base64,", "is empty")
    refuse("data:image/png;base64,AAAA", "is not an image")
    refuse("A" * 100_000, "A.* is not an image")


@pytest.mark.parametrize("size", [(20_000, 9_000), (14_000, 14_000), (60_000, 60_000)])
def test_a_bomb_is_known_by_its_header(size: tuple[int, int]) -> None:
    refuse(png_of(*size), "megapixels|too many pixels|exceeds limit", TooLargeError)


def test_half_of_the_limit_is_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Pillow would warn of 90 megapixels; the file's own rows are what is missing here."""
    refuse(png_of(9_000, 10_000), "is damaged")
    assert not recwarn.list


def test_the_limit_is_the_callers_to_lower(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(40, 50, 3))
    for source in (picture, png(picture), noise(40, 50, 3)):
        refuse(source, "at most", TooLargeError, max_pixels=1999)
        assert load_image(source, max_pixels=2000).shape == (40, 50, 3)


def test_heic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pillow-heif, the sentence says what to install; with it, a stub is damaged."""
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    if find_spec("pillow_heif"):
        refuse(head, "cannot read|is damaged|is not an image")

    def missing(name: str, *_: object) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", missing)
    refuse(head, r"HEIC image, which needs pillow-heif; pip install 'mlx-onevision\[heic\]'")
    assert importlib.import_module is not missing
