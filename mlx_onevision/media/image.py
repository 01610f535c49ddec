"""Images to tiles: reading what a caller calls an image, and cutting it as the reference does.

Two routes, as in the reference (transformers with its torchvision backend):

- A file (path, URL, bytes, base64): turned upright by its EXIF orientation, transparency dropped
  (the colours under it show). For 8-bit JPEG, PNG, GIF and still WebP this gives the levels that
  torchvision's decoder gives. Pillow's are taken for animations (the first frame), the transparent
  colour of a GIF, and BMP, TIFF, AVIF, HEIC (torchvision refuses them); and WebP is turned by its
  EXIF, too. Damaged metadata is ignored.
- An image in memory (PIL image, array): taken as it stands, not turned; transparency is laid on
  white. Arrays are uint8 or uint16 with 1, 3 or 4 channels, the first axis if both it and the last
  could be. Float arrays are refused: the reference would scale them as if they held 0..255.

Of more than 8 bits the upper 8 are taken, as the depth of the file says. The reference differs:
it takes 16-bit files as if they held 0..255, and clamps PIL images to 255.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import import_module
from io import BufferedReader, BytesIO, FileIO
from itertools import product
from tempfile import TemporaryFile
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.files import AVIF_BRANDS, HEIF_BRANDS, sniff
from mlx_onevision.media.anyres import fitted_size, select_best_resolution
from mlx_onevision.media.cache import array_key
from mlx_onevision.media.parallel import parallel_map
from mlx_onevision.media.resize import Pixels, resize_each, resize_on_square
from mlx_onevision.media.sources import IMAGE_KINDS, is_file, open_source, reason

if TYPE_CHECKING:
    from PIL.Image import Image

_OPENING = Lock()  # catch_warnings is one for all threads
MAX_PIXELS = 178_956_970  # where Pillow, too, refuses a file as a decompression bomb
MAX_READ = 64 << 20  # bytes of a file that are read before it is opened as an image
_LARGE = 1 << 22  # pixels of an image that is taken from Pillow in strips
MAX_SIDE = 200_000  # beyond, an image one pixel high would take gigabytes to resize

# What Pillow may open, the usual first. It knows more, but to draw an EPS it starts a program.
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "JPEG2000", "QOI", "AVIF")
_PNG = b"\x89PNG\r\n\x1a\n"
_END = struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))
# Chunks of a PNG that its pixels need; where only another one is damaged, the image is sound.
_CRITICAL, _USEFUL = (b"IHDR", b"PLTE", b"IDAT"), (b"tRNS", b"eXIf")
# EXIF orientation to the PIL.Image.Transpose that undoes it, by name.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = dict(enumerate(_TURNS.split(), 2))


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """``pixels`` as :func:`load_image` returns them, uint8 RGB (H, W, 3), to be given to it again.
    As a bare array, an image three pixels high would be ambiguous.
    """

    pixels: Pixels


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image's file, which is decoded only where its tiles are not known: its bytes, what errors
    call it, and the most pixels that it may have.
    """

    data: bytes
    name: str
    max_pixels: int


_Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image"
ImageSource: TypeAlias = "_Source | NDArray[Any] | DecodedImage | EncodedImage"


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Pixels:
    """``source`` as uint8 RGB (H, W, 3).

    source : path, http(s) URL, data URI or base64 text, bytes, binary file, PIL image, array, or
        :class:`DecodedImage` or :class:`EncodedImage`.

    Raises:
        MediaError: whatever keeps it from being read, in one sentence that names it.
        TooLargeError: more than ``max_pixels`` (before decoding), or too large a download.
    """
    from PIL.Image import Image

    if isinstance(source, DecodedImage):
        high, wide, _ = source.pixels.shape
        _check_size("the decoded image", high, wide, max_pixels)
        return source.pixels
    if isinstance(source, EncodedImage):
        return _decoded(source.data, source.name, min(max_pixels, source.max_pixels))
    if isinstance(source, Image):
        return _from_object(source, max_pixels)
    if not is_file(source):
        return _from_array(source, max_pixels)
    return _decoded(*open_source(source, "image"), max_pixels)


def identify_image(source: ImageSource) -> tuple[Hashable | None, Callable[[], Pixels]]:
    """What tells an image from all others, by the bytes of its file or by its pixels, and what
    reads the pixels (:func:`load_image`, whose errors both raise). A file of more than
    ``MAX_READ`` bytes is not looked into: None.
    """
    if isinstance(source, EncodedImage):
        return ("file", sha256(source.data).digest()), lambda: load_image(source)
    if isinstance(source, DecodedImage) or not is_file(source):
        pixels = load_image(source)
        return array_key(pixels), lambda: pixels
    data, name = open_source(source, "image")
    if isinstance(data, FileIO) and os.fstat(data.fileno()).st_size <= MAX_READ:
        with data, _media_errors(name, f"cannot read {name}"):
            data = data.readall()  # once, so that these are the bytes that are decoded
    key = ("file", sha256(data).digest()) if isinstance(data, bytes) else None
    return key, lambda: _decoded(data, name, MAX_PIXELS)


def tile_image(image: Pixels, config: ImageConfig) -> Pixels:
    """The tiles of an image that stands alone in its conversation, uint8 (1 + tiles, S, S, 3): the
    whole image squeezed into one tile, and those cut, row by row, from the image fitted into the
    best of the grids and centred on black.
    """
    tile, size = config.size, (image.shape[0], image.shape[1])
    high, wide = select_best_resolution(size, config.image_grid_pinpoints)
    inner = fitted_size(size, (high, wide))
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    tiles = np.zeros((1 + (high // tile) * (wide // tile), tile, tile, 3), np.uint8)
    tiles[0], fitted = resize_each(image, [(tile, tile), inner])
    corners = product(range(-top, high - top, tile), range(-left, wide - left, tile))

    def cut(number: int, y: int, x: int) -> None:
        part = fitted[max(y, 0) : max(y + tile, 0), max(x, 0) : max(x + tile, 0)]
        y, x = max(-y, 0), max(-x, 0)
        tiles[number, y : y + part.shape[0], x : x + part.shape[1]] = part

    parallel_map(lambda place: cut(place[0], *place[1]), enumerate(corners, 1))
    return tiles


def squeeze_to_tile(image: Pixels, config: ImageConfig) -> Pixels:
    """The one tile of an image as ``image_aspect_ratio`` "square" has it: uint8 (1, S, S, 3)."""
    return resize_each(image, [(config.size, config.size)])[0][None]


def pad_to_square_tile(image: Pixels, config: ImageConfig) -> Pixels:
    """The one tile of an image among several: uint8 (1, S, S, 3), padded with the mean colour."""
    fill = [int(mean * 255) for mean in config.image_mean]
    return resize_on_square(image, config.size, fill)[None]


@lru_cache(maxsize=8)
def normalization_table(config: ImageConfig) -> NDArray[np.float32]:
    """The pixel value of each level in each channel: float32 (256, 3), read-only. As in the
    reference, the rescaling is folded into mean and standard deviation, all in float32.
    """
    unscale = np.float32(1.0 / config.rescale_factor)
    mean = np.array(config.image_mean, np.float32) * unscale
    std = np.array(config.image_std, np.float32) * unscale
    table = ((np.arange(256, dtype=np.float32)[:, None] - mean) / std).astype(np.float32)
    table.flags.writeable = False
    return table


def pixel_values(tiles: Pixels, config: ImageConfig) -> NDArray[np.float32]:
    """Tiles (n, S, S, 3) as the reference's ``pixel_values``: float32 (n, 3, S, S)."""
    table = normalization_table(config)
    values = np.empty((len(tiles), 3, *tiles.shape[1:3]), np.float32)
    for channel in range(3):
        np.take(table[:, channel], tiles[..., channel], out=values[:, channel])
    return values


def _check_size(name: str, high: int, wide: int, max_pixels: int) -> None:
    if min(high, wide) < 1:
        raise MediaError(f"{name} has no pixels ({wide}x{high})")
    if high * wide > max_pixels:
        millions = f"{high * wide / 1e6:,.0f} megapixels ({wide}x{high})"
        raise TooLargeError(f"{name} has {millions}; at most {max_pixels / 1e6:,.0f} are read")
    if max(high, wide) > MAX_SIDE:
        raise TooLargeError(f"{name} is {wide}x{high} pixels; a side has at most {MAX_SIDE:,}")


def _decoded(data: bytes | FileIO, name: str, max_pixels: int) -> Pixels:
    with BytesIO(data) if isinstance(data, bytes) else BufferedReader(data) as file:
        return _from_file(file, name, max_pixels)


def _from_file(file: BinaryIO, name: str, max_pixels: int) -> Pixels:
    with _media_errors(name, f"cannot read {name}"):
        head = file.read(1024)
        file.seek(0)
    if not head:
        raise MediaError(f"{name} is empty (0 bytes)")
    kinds = _KINDS
    brands = head[8 : int.from_bytes(head[:4], "big")]
    avif = any(brand in brands for brand in AVIF_BRANDS)  # beside a more general brand
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and not avif:
        kinds = ("HEIF",)
        try:
            import_module("pillow_heif").register_heif_opener()
        except ImportError:
            needs = "needs pillow-heif; pip install 'mlx-onevision[heic]'"
            raise MediaError(f"{name} is a HEIC image, which {needs}") from None
    try:
        return _opened(file, name, kinds, max_pixels)
    except TooLargeError:
        raise
    except MediaError as error:
        try:
            if head.startswith(_PNG):
                with _essential_png(file) as essential:
                    return _opened(essential, name, kinds, max_pixels)
            if avif:  # libavif refuses damaged EXIF; under another name, it is not parsed
                file.seek(0)
                data = file.read().replace(b"Exif", b"exif", 1)
                return _opened(BytesIO(data), name, kinds, max_pixels)
        except TooLargeError:
            raise
        except MediaError:
            pass  # it was not the metadata
        if sniff(head) == "video":
            raise MediaError(
                f"{name} is a video, not an image; give it as a video (--video, videos=)"
            ) from error
        raise


def _opened(file: BinaryIO, name: str, kinds: tuple[str, ...], max_pixels: int) -> Pixels:
    from PIL import Image, UnidentifiedImageError

    with _media_errors(name, f"cannot read {name}"):
        try:
            with _OPENING, warnings.catch_warnings():
                # Of metadata, and from half of Pillow's limit on; ours is checked before decoding.
                warnings.simplefilter("ignore")
                image = Image.open(file, formats=kinds)
        except (UnidentifiedImageError, KeyError) as error:  # KeyError: Pillow built without a kind
            raise MediaError(
                f"{name} is not an image of the kinds that are read ({IMAGE_KINDS})"
            ) from error
    with image:
        _check_size(name, image.height, image.width, max_pixels)
        with _media_errors(name, f"{name} is damaged"):
            _drop_xmp(image)  # in a TIFF, by which loading turns
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            # Of no use once it is dropped, but Pillow would warn that it is.
            image.info.pop("transparency", None)
            grey = _eight_bits(image, name)
            rgb = grey if grey.mode == "RGB" else grey.convert("RGB")
            return _pixels(rgb.transpose(Image.Transpose[turn]) if turn else rgb)


def _orientation(image: Image) -> int:
    """By EXIF alone: as in browsers and the reference, what XMP says of it does not count."""
    _drop_xmp(image)
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is damaged in it
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged, in any way
        return 1


def _drop_xmp(image: Image) -> None:
    for name in ("XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)


def _essential_png(file: BinaryIO) -> BinaryIO:
    """A PNG without the chunks that its pixels do not need, and with an end."""
    essential = TemporaryFile()
    essential.write(_PNG)
    file.seek(len(_PNG))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in _CRITICAL:
            essential.write(head)
            left = length + 4
            while left and (part := file.read(min(left, 1 << 20))):
                essential.write(part)
                left -= len(part)
            if left:  # cut short: what is missing is not made up
                break
        elif kind in _USEFUL and length < 1 << 16:
            data = file.read(length + 4)
            if data[length:] == zlib.crc32(kind + data[:length]).to_bytes(4, "big"):
                essential.write(head + data)
        elif kind != b"IEND":
            file.seek(length + 4, os.SEEK_CUR)
    else:
        essential.write(_END)
    essential.seek(0)
    return essential


def _eight_bits(image: Image, name: str) -> Image:
    """A grey image of more than 8 bits as one of 8, without its metadata; any other as it is.

    Raises:
        MediaError: for values of which black and white are not known.
    """
    from PIL import Image as module

    advice = "scale them to 0..255 and save them in 8 bits"
    values = np.asarray(image) if image.mode.partition(";")[0] in ("I", "F") else None
    if values is None:
        return image
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and 1 < high <= 255):  # NaN neither; up to 1, white may be 1
            raise MediaError(f"{name} has values from {low:g} to {high:g}; {advice}")
        return image.convert("L")
    tags = getattr(image, "tag_v2", {})  # a TIFF's: bits, 258; whether signed, 339; which is black
    bits = tags.get(258, (16,))[0]
    if tags.get(339, (1,))[0] == 2:
        bits -= 1
    elif bits == 32:
        values = values.view(np.uint32)
    low, high = int(values.min()), int(values.max())
    if image.mode == "I" and image.format is None and high < 256:
        bits = 8  # made in memory from one of 8 bits
    if low < 0 or high >= 1 << bits:
        raise MediaError(f"{name} has values from {low} to {high}; {advice}")
    levels = (values >> (bits - 8)).astype(np.uint8)
    return module.fromarray(~levels if tags.get(262) == 0 else levels)


@contextmanager
def _media_errors(name: str, problem: str) -> Iterator[None]:
    """Turns whatever Pillow raises into a MediaError: its parsers can fail in any way."""
    from PIL.Image import DecompressionBombError

    try:
        yield
    except (MediaError, MemoryError, RecursionError):
        raise
    except DecompressionBombError as error:
        raise TooLargeError(f"{name} has too many pixels: {reason(error)}") from error
    except Exception as error:
        raise MediaError(f"{problem}: {reason(error)}") from error


def _from_object(image: Image, max_pixels: int) -> Pixels:
    from PIL import Image as module

    name = f"the {image.width}x{image.height} PIL image"
    _check_size(name, image.height, image.width, max_pixels)
    with _media_errors(name, f"cannot read {name}"):  # its file may be read only now
        image = _eight_bits(image, name)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = module.new("RGBA", image.size, (255, 255, 255, 255))
            image = module.alpha_composite(white, image.convert("RGBA"))
        return _pixels(image if image.mode == "RGB" else image.convert("RGB"))


def _pixels(image: Image) -> Pixels:
    """Of an RGB image. Of a large one Pillow would make two copies, neither of which a cache holds;
    a strip takes part of the time.
    """
    if image.height * image.width < _LARGE:
        return np.asarray(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    band = max(1, _LARGE // 16 // image.width)
    for top in range(0, image.height, band):
        box = (0, top, image.width, min(top + band, image.height))
        pixels[top : top + band] = np.asarray(image.crop(box))
    return pixels


def _from_array(source: object, max_pixels: int) -> Pixels:
    try:
        array = np.asarray(source)
    except (TypeError, ValueError):
        array = np.array(None)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        kind = type(source).__name__
        raise MediaError(f"a {kind} is not an image; give a path, URL, bytes, PIL image or array")
    name = f"the array of shape {array.shape}"
    if array.ndim == 2:
        raise MediaError(f"{name} has no channel axis; give array[:, :, None] for a grey image")
    if array.ndim != 3:
        raise MediaError(f"{name} is not one image; an image has three axes")
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8:
        way = "" if array.dtype.kind == "b" else "scale to 0..255 and "
        way = "multiply 0..1 by 255 and " if array.dtype.kind == "f" else way
        raise MediaError(f"{name} holds {array.dtype}, not uint8; {way}use astype('uint8')")
    if array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    elif array.shape[2] not in (1, 3, 4):
        raise MediaError(f"{name} has no axis of 1, 3 or 4 channels, first or last")
    _check_size(name, array.shape[0], array.shape[1], max_pixels)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        return _on_white(array)
    return np.ascontiguousarray(array)


def _on_white(rgba: Pixels) -> Pixels:
    """(H, W, 4) to (H, W, 3), in float32 step by step as torchvision's conversions do it."""
    scale, unscale = np.float32(1 / 255), np.float32(255 + 1.0 - 1e-3)
    out = np.empty((*rgba.shape[:2], 3), np.uint8)
    for row in range(len(rgba)):
        values = rgba[row].astype(np.float32) * scale
        alpha = values[:, 3:]
        out[row] = (values[:, :3] * alpha + (1 - alpha)) * unscale
    return out
