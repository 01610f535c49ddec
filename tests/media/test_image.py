"""Pictures to pixels, held against recordings of the reference; and every way to be no picture."""

from __future__ import annotations

import base64
import importlib
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import (
    CLIP_MEAN,
    CLIP_STD,
    DEEP,
    TILED_SIZES,
    arrays,
    digest,
    names,
    noise,
    objects,
    recorded,
    smooth,
)
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from videos import counting

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media import image as module
from mlx_onevision.media.image import (
    DecodedImage,
    load_image,
    normalization_table,
    pad_to_square_tile,
    pixel_values,
    tile_image,
)

HALF = ImageConfig()
CLIP = ImageConfig(image_mean=CLIP_MEAN, image_std=CLIP_STD)


def png(image: Image.Image, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def png_of(high: int, wide: int, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG written by hand: any size in the header, any depth, whatever rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", wide, high, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Pixel values


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("halves", HALF),
        ("clip", CLIP),
        ("rescaled by 1/127.5", ImageConfig(rescale_factor=1 / 127.5)),
        ("clip, rescaled by 0.004", ImageConfig(384, CLIP_MEAN, CLIP_STD, 0.004)),
    ],
)
def test_normalization_is_the_references_to_the_bit(name: str, config: ImageConfig) -> None:
    table = normalization_table(config)
    assert table.dtype == np.float32
    assert np.array_equal(table, recorded()[f"table/{name}"])
    assert table.tobytes() == np.ascontiguousarray(recorded()[f"table/{name}"]).tobytes()


def test_the_table_cannot_be_changed_by_who_gets_it() -> None:
    with pytest.raises(ValueError, match="read-only"):
        normalization_table(HALF)[0] = 0


@pytest.mark.parametrize(
    "index", range(len(TILED_SIZES)), ids=lambda i: "{}x{}".format(*TILED_SIZES[i])
)
def test_tiles_are_the_references_to_the_bit(index: int) -> None:
    high, wide = TILED_SIZES[index]
    image = noise(high, wide, 3, seed=high + wide)
    tiles, square = tile_image(image, HALF), pad_to_square_tile(image, CLIP)
    assert tiles.dtype == square.dtype == np.uint8
    assert np.array_equal(digest(pixel_values(tiles, HALF)), recorded()["tiles"][index])
    assert np.array_equal(digest(pixel_values(square, CLIP)), recorded()["squares"][index])


def test_pixel_values_gathers_from_the_table() -> None:
    tiles = noise(2, 5, 5, 3)
    values = pixel_values(tiles, CLIP)
    assert values.shape == (2, 3, 5, 5)
    assert np.array_equal(values[1, 2, 3, 4], normalization_table(CLIP)[tiles[1, 3, 4, 2], 2])


def test_tiles_of_another_size() -> None:
    """The grid, centred on black with the odd row below, cut row by row."""
    config = ImageConfig(size=8, image_grid_pinpoints=((8, 8), (16, 16), (8, 24)))
    image = np.full((5, 20, 3), 200, np.uint8)
    tiles = tile_image(image, config)
    assert tiles.shape == (4, 8, 8, 3)
    assert (tiles[0] == 200).all()
    rows = tiles[1:].swapaxes(0, 1).reshape(8, 24, 3)
    assert [int(row[0, 0]) for row in rows] == [0] + [200] * 6 + [0]
    assert pad_to_square_tile(image, config).shape == (1, 8, 8, 3)


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
    monkeypatch.setattr(module, "_LARGE", large)
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


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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


def test_what_is_no_image_says_what_it_is_or_which_kinds_are() -> None:
    refuse(counting(2), "is a video, not an image; give it as a video")
    refuse(counting(2, "mkv"), "is a video, not an image; give it as a video")
    refuse(b"%PDF-1.7 " + bytes(40), r"of the kinds that are read \(JPEG, .*HEIC\)")


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


def test_pillow_is_imported_when_a_picture_is_read() -> None:
    program = (
        "import sys, mlx_onevision.media.image;"
        "print([name for name in ('PIL', 'urllib.request') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_smooth_picture_survives_tiling() -> None:
    """An image of a grid's own size is cut, not resampled."""
    image = smooth(768, 384)
    tiles = tile_image(image, HALF)
    assert tiles.shape == (3, 384, 384, 3)
    assert np.array_equal(np.concatenate(tiles[1:]), image)
