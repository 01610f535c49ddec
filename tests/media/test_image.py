"""Images in memory and in files are decoded as the reference decodes them."""

from __future__ import annotations

import base64
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import (
    DEEP,
    arrays,
    names,
    noise,
    objects,
    png,
    png_of,
    recorded,
    saved,
    smooth,
)
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media import rgb
from mlx_onevision.media.image import DecodedImage, load_image
from mlx_onevision.media.image_parts import MAX_FRAMES, MAX_PARTS

# Pictures in memory


@pytest.mark.parametrize("name", [name for name in names("object") if name not in DEEP])
def test_an_object_is_taken_as_the_reference_takes_it(name: str) -> None:
    picture = objects()[name]
    before = picture.mode, picture.tobytes(), dict(picture.info)
    assert np.array_equal(load_image(picture), recorded()[f"object/{name}"])
    assert (picture.mode, picture.tobytes(), dict(picture.info)) == before


@pytest.mark.parametrize("name", names("array"))
def test_an_array_is_taken_as_the_reference_takes_it(name: str) -> None:
    assert np.array_equal(load_image(arrays()[name]), recorded()[f"array/{name}"])


@pytest.mark.parametrize("high", [1, 3, 4, 5])
def test_a_decoded_image_is_taken_as_it_is(high: int) -> None:
    """Its pixels are neither copied nor turned, however few rows there are."""
    pixels = load_image(png(Image.new("RGB", (6, high), "red")))
    assert load_image(DecodedImage(pixels)) is pixels
    with pytest.raises(TooLargeError):
        load_image(DecodedImage(pixels), max_pixels=high)


@pytest.mark.parametrize("large", [1, 100, 16 * 40 * 7])
def test_a_large_image_is_taken_from_pillow_in_strips(
    large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rgb, "_LARGE", large)
    image = Image.fromarray(noise(50, 40, 3))
    turned = Image.Exif()
    turned[0x0112] = 6
    assert np.array_equal(load_image(image), np.asarray(image))
    expected = np.rot90(np.asarray(image), -1)
    assert np.array_equal(load_image(png(image, exif=turned)), expected)


def test_what_speaks_the_array_protocol_is_an_array() -> None:
    class Wrapped:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return noise(4, 5, 3)

    wrapped: Any = Wrapped()
    assert np.array_equal(load_image(wrapped), load_image(noise(4, 5, 3)))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (noise(40, 50), r"shape \(40, 50\) has no channel axis; give array\[:, :, None\]"),
        (noise(2, 40, 50, 3), "is not one image"),
        (noise(40, 50, 2), "no axis of 1, 3 or 4 channels"),
        (noise(40, 50, 3) / 255, r"float64, not uint8; multiply 0..1 by 255"),
        (
            noise(40, 50, 3).astype(np.int64),
            r"int64, not uint8; scale to 0..255 and use astype\('uint8'\)",
        ),
        (noise(40, 50, 3) > 127, "bool, not uint8"),
        (np.zeros((0, 50, 3), np.uint8), "no pixels"),
        (np.array(None), "is not an image"),
        ({"path": "a.png"}, "a dict is not an image"),
        (None, "a NoneType is not an image"),
        (7, "an? int is not an image"),
        ([1, [2, 3]], "a list is not an image"),
    ],
)
def test_an_array_that_is_no_picture(array: Any, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        load_image(array)


def test_an_object_whose_file_is_damaged() -> None:
    data = png(Image.fromarray(noise(64, 64, 3)))
    lazy = Image.open(BytesIO(data[: len(data) // 2]))
    with pytest.raises(MediaError, match="cannot read the 64x64 PIL image"):
        load_image(lazy)


# Files


@pytest.mark.parametrize("name", names("file"))
def test_a_file_is_decoded_as_torchvision_decodes_it(name: str) -> None:
    """Turned upright, transparency dropped. JPEG decoders may differ in the last level."""
    made = load_image(recorded()[f"file/{name}"].tobytes()).astype(int)
    expected = recorded()[f"decoded/{name}"]
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= (1 if name.startswith(("jpeg", "webp lossy")) else 0)


def test_every_way_to_name_a_file_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recorded()["file/jpeg turned 6"].tobytes()
    path = tmp_path / "a picture.jpg"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    expected = load_image(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = base64.encodebytes(data).decode()
    for source in (
        path,
        str(path),
        "~/a picture.jpg",
        text,
        bytearray(data),
        BytesIO(data),
        path.open("rb"),
        lines,
        f"data:image/jpeg;base64,{text}",
        f"DATA:image/jpeg;BASE64,{text}",
        f"data:application/octet-stream;base64,{lines}",
    ):
        assert np.array_equal(load_image(source), expected)
        if not isinstance(source, (str, Path, bytearray)):
            source.close()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_what_lies_behind_an_image_is_not_looked_at(kind: str) -> None:
    """A motion photo has a film there, in which any bytes may be."""
    image = saved(Image.fromarray(smooth(48, 64)), kind)
    scans, chunks = b"\xff\xda\0\2" * 200, bytes(12 * (MAX_PARTS + 1))
    frames = b"\0\0\0\0fcTL\0\0\0\0" * (MAX_FRAMES + 1) + image * (MAX_FRAMES + 1)
    for behind in (scans, chunks, frames):
        assert np.array_equal(load_image(image + behind), load_image(image))


def test_scans_are_counted_to_the_end_of_the_image_and_not_in_its_segments() -> None:
    data = saved(Image.fromarray(smooth(48, 64)), "JPEG", progressive=True, restart_marker_blocks=1)
    place = data.rindex(b"\xff\xda")
    segment = b"\xff\xfe\x03\x22" + b"\xff\xda" * 200 + b"\xff\xd9" * 200
    assert np.array_equal(load_image(data[:place] + segment + data[place:]), load_image(data))
    # A marker that the decoder skips alone hides nothing, and neither does a false end.
    for hiding in (b"", segment, b"\xff\x02\xff\xff"):
        with pytest.raises(MediaError, match=r"has \d+ scans, more than 100; save it anew"):
            load_image(data[:place] + hiding + data[place:-2] * 200 + data[-2:])


def test_a_file_whose_name_could_be_base64_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a" * 64).write_bytes(png(Image.fromarray(noise(4, 5, 3))))
    assert load_image("a" * 64).shape == (4, 5, 3)
    # One line, without a slash, longer than a name may be.
    text = base64.b64encode(png(Image.fromarray(np.zeros((9, 9, 3), np.uint8))) + bytes(300))
    assert load_image(text.decode().replace("/", "+")).shape == (9, 9, 3)
    with pytest.raises(MediaError, match="read as base64"):
        load_image("b" * 64)
    with pytest.raises(MediaError, match="'bbbb' does not exist"):
        load_image("bbbb")


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(8, 32)


def tiff(values: NDArray[Any], signed: bool = False, white: int = 1, bits: int = 0) -> bytes:
    """A grey TIFF written by hand: of any depth, and with 0 as black (``white`` 1) or white."""
    high, wide = values.shape
    data = values.tobytes()
    bits = bits or 8 * values.itemsize
    tags = [(256, wide), (257, high), (258, bits), (259, 1), (262, white), (273, 8), (277, 1)]
    tags += [(278, high), (279, len(data)), (339, 1 + signed)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


DEEPER: dict[str, Callable[[], Any]] = {
    "png": lambda: png(Image.fromarray(RAMP)),
    "tiff": lambda: tiff(RAMP),
    "tiff, 0 is white": lambda: tiff(~RAMP, white=0),
    "tiff, 32 bits": lambda: tiff(RAMP.astype(np.uint32) << 16),
    "tiff, 32 bits, signed": lambda: tiff(RAMP.astype(np.int32) << 15, signed=True),
    "pgm": lambda: b"P5 32 8 65535\n" + RAMP.astype(">u2").tobytes(),
    "pgm, 12 bits": lambda: b"P5 32 8 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "jpeg 2000": lambda: saved(Image.fromarray(RAMP), "JPEG2000", irreversible=False),
    "object I;16": lambda: Image.fromarray(RAMP),
    "object I;16B": lambda: Image.frombytes("I;16B", (32, 8), RAMP.astype(">u2").tobytes()),
    "object I": lambda: Image.fromarray(RAMP.astype(np.int32)),
    "object I of 8 bits": lambda: Image.fromarray((RAMP >> 8).astype(np.int32)),
    "object F of 8 bits": lambda: Image.fromarray((RAMP >> 8).astype(np.float32)),
    "array": lambda: np.repeat(RAMP[:, :, None], 3, axis=2),
    "array, other bytes first": lambda: RAMP[:, :, None].astype(">u2"),
}


@pytest.mark.parametrize("name", DEEPER)
def test_more_than_eight_bits_are_scaled_by_the_depth_of_the_file(name: str) -> None:
    made = load_image(DEEPER[name]())
    assert np.array_equal(made, np.repeat(RAMP[:, :, None] >> 8, 3, axis=2))


def test_colours_of_sixteen_bits_keep_the_upper_byte() -> None:
    samples = (noise(6, 7, 3).astype(np.uint16) << 8) + 77
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    assert np.array_equal(load_image(png_of(6, 7, 16, 2, rows)), noise(6, 7, 3))


XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>"


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "TIFF", "PNG"])
def test_an_orientation_in_xmp_alone_turns_nothing(kind: str) -> None:
    options: dict[str, Any] = {"xmp": XMP}
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options = {"pnginfo": info}
    if kind == "TIFF":
        options = {"tiffinfo": {700: XMP}}
    data = saved(Image.fromarray(smooth(48, 64)), kind, **options)
    assert XMP in data
    assert load_image(data).shape == (48, 64, 3)


@pytest.mark.parametrize("brands", [b"mif1avif", b"msf1" * 20 + b"avif", b"miafMA1Bavif"])
def test_an_avif_beside_more_general_brands_is_not_a_heic(brands: bytes) -> None:
    """Wherever in the list its brand stands."""
    data = saved(Image.fromarray(smooth(48, 64)), "AVIF")
    size = int.from_bytes(data[:4], "big")
    head = struct.pack(">I", 16 + len(brands)) + b"ftypmif1\0\0\0\0" + brands
    data, moved = head + data[size:], len(head) - size
    place = data.index(b"iloc") + 4  # version 0, offsets of 4 bytes: where the items' data begins
    for match in re.finditer(b"mdat", data[:4096]):
        mdat = match.start() + 4
        old = struct.pack(">I", mdat - moved)
        data = data[:place] + data[place:].replace(old, struct.pack(">I", mdat), 1)
    assert np.abs(load_image(data).astype(int) - smooth(48, 64)).mean() < 8


def test_kinds_beyond_torchvisions() -> None:
    """BMP and TIFF; the first frame of an animation; EXIF in WebP."""
    image = Image.fromarray(noise(6, 7, 3))
    for kind in ("BMP", "TIFF"):
        file = BytesIO()
        image.save(file, kind)
        assert np.array_equal(load_image(file.getvalue()), noise(6, 7, 3))
    file = BytesIO()
    first, second = objects()["P"], objects()["P"].transpose(Image.Transpose.ROTATE_180)
    first.save(file, "GIF", save_all=True, append_images=[second])
    assert np.array_equal(load_image(file.getvalue()), np.asarray(first.convert("RGB")))
    file, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 8
    image.save(file, "WEBP", lossless=True, exif=exif)
    assert np.array_equal(load_image(file.getvalue()), np.rot90(noise(6, 7, 3)))


def test_pillow_is_imported_when_a_picture_is_read() -> None:
    program = (
        "import sys, mlx_onevision.media.image;"
        "print([name for name in ('PIL', 'urllib.request') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
