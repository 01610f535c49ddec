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

All threads together hold ``MEMORY`` bytes of images that are being decoded, or one image, whatever
it takes: 7 bytes a pixel, more for some kinds (see :func:`_opened`).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
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
from mlx_onevision.media.decoder import Limits, decode_image
from mlx_onevision.media.image_parts import ICON, icon_sizes, kind_of, orientation, reduced
from mlx_onevision.media.parallel import Budget, no_check, parallel_map
from mlx_onevision.media.resize import Pixels, resize_each, resize_on_square
from mlx_onevision.media.sources import IMAGE_KINDS, is_file, open_source, reason

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses a file as a decompression bomb
MAX_READ = 64 << 20  # bytes of a file that are read before it is opened as an image
_LARGE = 1 << 22  # pixels of an image that is taken from Pillow in strips
MAX_SIDE = 200_000  # beyond, an image one pixel high would take gigabytes to resize
MEMORY = 1 << 30  # bytes of images being decoded, of all threads
_TRIMMED = 16 << 20  # bytes from which on freed memory is given back to the system

_memory = Budget(MEMORY)

# What Pillow may open, the usual first. It knows more, but to draw an EPS it starts a program.
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "JPEG2000", "QOI", "AVIF")
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I": 16, "F": 16}  # bytes a pixel in Pillow; else 4


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """``pixels`` as :func:`load_image` returns them, uint8 RGB (H, W, 3), to be given to it again.
    As a bare array, an image three pixels high would be ambiguous.
    """

    pixels: Pixels


class PixelCount:
    """The pixels that the images of one request may have together, decoded for it."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._lock = Lock()

    def take(self, pixels: int) -> None:
        """Raises TooLargeError beyond them."""
        with self._lock:
            self._taken += pixels
            if self._taken > self._most:
                together = f"{self._taken / 1e6:,.0f} megapixels together"
                raise TooLargeError(
                    f"the images of the request have more than {together}; at most "
                    f"{self._most / 1e6:,.0f} are read"
                )


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image's file, which is decoded only where its tiles are not known.

    data, name : its bytes, and what errors call it.
    max_pixels : that it may have. together : that it may have with others.
    limits : of the process that decodes it unless it is a PNG, JPEG, WebP, GIF or BMP; None for
        none: every kind is decoded here.
    check : called while it waits; ends the work by raising.
    """

    data: bytes
    name: str
    max_pixels: int
    together: PixelCount | None = None
    limits: Limits | None = None
    check: Callable[[], None] = no_check


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
    with reading_image(source, max_pixels) as pixels:
        return pixels


@contextmanager
def reading_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Iterator[Pixels]:
    """:func:`load_image`, of which other threads know until the end that it holds memory."""
    from PIL.Image import Image

    with ExitStack() as held:
        if isinstance(source, DecodedImage):
            high, wide, _ = source.pixels.shape
            _check_size("the decoded image", high, wide, max_pixels)
            yield source.pixels
        elif isinstance(source, EncodedImage):
            most = min(max_pixels, source.max_pixels)
            yield _decoded(source.data, replace(source, max_pixels=most), held)
        elif isinstance(source, Image):
            yield _from_object(source, max_pixels)
        elif not is_file(source):
            yield _from_array(source, max_pixels)
        else:
            data, name = open_source(source, "image")
            if isinstance(data, FileIO):
                held.enter_context(data)
            yield _decoded(data, EncodedImage(b"", name, max_pixels), held)


def identify_image(
    source: ImageSource,
) -> tuple[Hashable | None, Callable[[], AbstractContextManager[Pixels]]]:
    """What tells an image from all others, by the bytes of its file or by its pixels, and what
    reads the pixels (:func:`reading_image`, whose errors both raise). A file of more than
    ``MAX_READ`` bytes is not looked into: None.
    """
    if isinstance(source, EncodedImage):
        return ("file", sha256(source.data).digest()), partial(reading_image, source)
    if isinstance(source, DecodedImage) or not is_file(source):
        pixels = load_image(source)
        return array_key(pixels), partial(nullcontext, pixels)
    data, name = open_source(source, "image")
    if isinstance(data, FileIO) and os.fstat(data.fileno()).st_size > MAX_READ:
        data.close()
        return None, partial(reading_image, source)
    if isinstance(data, FileIO):
        with data, _media_errors(name, f"cannot read {name}"):
            data = data.readall()  # once, so that these are the bytes that are decoded
    read = partial(reading_image, EncodedImage(data, name, MAX_PIXELS))
    return ("file", sha256(data).digest()), read


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


class _TooHeavyError(Exception):
    """It takes more than ``MEMORY``, and another process may decode it."""


def _decoded(data: bytes | FileIO, about: EncodedImage, held: ExitStack) -> Pixels:
    """The pixels of a file, of which ``about`` has everything but the bytes. ``held`` gets what is
    to be left once they are not needed any more.
    """
    name = about.name
    with _media_errors(name, f"cannot read {name}"):
        head = data[:1024] if isinstance(data, bytes) else os.pread(data.fileno(), 1024, 0)
        if not head:
            raise MediaError(f"{name} is empty (0 bytes)")
        kind = kind_of(head)
        if isinstance(data, FileIO) and kind:
            data = data.readall()
    if about.limits is None or kind:
        try:
            return _read(data, head, about, held)
        except _TooHeavyError:
            pass
    assert isinstance(data, bytes) and about.limits is not None
    with TemporaryFile() as file:
        file.write(data)
        file.flush()
        limits = replace(about.limits, pixels=about.max_pixels)
        pixels = decode_image(file, name, limits, about.check)
    if about.together is not None:
        about.together.take(pixels.shape[0] * pixels.shape[1])
    held.enter_context(_holding(pixels.nbytes, about.check))
    return pixels


def _read(data: bytes | FileIO, head: bytes, about: EncodedImage, held: ExitStack) -> Pixels:
    """As :func:`_decoded`, in this process."""
    name, kind = about.name, kind_of(head)
    kinds = (kind,) if kind else _KINDS
    brands = head[8 : int.from_bytes(head[:4], "big")]
    avif = any(brand in brands for brand in AVIF_BRANDS)  # beside a more general brand
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and not avif:
        kinds = ("HEIF",)
        try:
            import_module("pillow_heif").register_heif_opener()
        except ImportError:
            needs = "needs pillow-heif; pip install 'mlx-onevision[heic]'"
            raise MediaError(f"{name} is a HEIC image, which {needs}") from None
    exif, extra = None, 12 if kind == "WEBP" else 0  # its frame, and two canvases
    if isinstance(data, bytes):
        data, exif, extra = reduced(data, name, extra)
    file = BytesIO(data) if isinstance(data, bytes) else BufferedReader(data)
    try:
        return _opened(file, about, kinds, exif, extra, held)
    except TooLargeError:
        raise
    except MediaError as error:
        if avif:  # libavif refuses damaged EXIF; under another name, it is not parsed
            file.seek(0)
            renamed = BytesIO(file.read().replace(b"Exif", b"exif", 1))
            try:
                return _opened(renamed, about, kinds, exif, extra, held)
            except TooLargeError:
                raise
            except MediaError:
                pass  # it was not the metadata
        if sniff(head) == "video":
            raise MediaError(
                f"{name} is a video, not an image; give it as a video (--video, videos=)"
            ) from error
        raise


def _opened(
    file: BinaryIO,
    about: EncodedImage,
    kinds: tuple[str, ...],
    exif: bytes | None,
    extra: int,
    held: ExitStack,
) -> Pixels:
    """exif : None where Pillow has to be asked for it. extra : bytes that decoding holds for each
    pixel beside Pillow's own 1 to 4 and our 3.
    """
    from PIL import Image, UnidentifiedImageError

    name = about.name
    with _media_errors(name, f"cannot read {name}"):
        if file.read(4) == ICON:
            for high, wide in icon_sizes(file):
                _check_size(name, high, wide, about.max_pixels)
        file.seek(0)
        try:
            with _quiet:  # of metadata, and from half of Pillow's limit on; ours is checked below
                image = Image.open(file, formats=kinds)
        except (UnidentifiedImageError, KeyError) as error:  # KeyError: Pillow built without a kind
            raise MediaError(
                f"{name} is not an image of the kinds that are read ({IMAGE_KINDS})"
            ) from error
    with image, ExitStack() as taken:
        _check_size(name, image.height, image.width, about.max_pixels)
        pixels = image.height * image.width
        size = pixels * (_STORED.get(image.mode, 4) + 3 + extra)
        if size > MEMORY and about.limits is not None:
            raise _TooHeavyError
        if about.together is not None:
            about.together.take(pixels)
        taken.enter_context(_holding(size, about.check))
        with _media_errors(name, f"{name} is damaged"):
            _drop_xmp(image)  # in a TIFF, by which loading turns
            image.load()
            _check_size(name, image.height, image.width, about.max_pixels)  # as it was decoded
            if exif is None and image.format == "WEBP":
                exif = image.info.get("exif", b"")
            turn = _orientation(image) if exif is None else orientation(exif)
            # Of no use once it is dropped, but Pillow would warn that it is.
            image.info.pop("transparency", None)
            made = _pixels(_eight_bits(image, name), turn)
        held.push(taken.pop_all())
        return made


@contextmanager
def _holding(size: int, check: Callable[[], None]) -> Iterator[None]:
    """Memory of images that are being decoded, which is given back to the system at the end."""
    try:
        with _memory.holding(size, check):
            yield
    finally:
        if size >= _TRIMMED:
            _trim()()


@cache
def _trim() -> Callable[[], object]:
    """What has the C library give back memory that was freed. glibc would keep that of each thread;
    macOS's has no such function, and needs none for blocks as large as Pillow's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return no_check if trim is None else partial(trim, 0)


class _Quiet:
    """No warnings while any thread is in it: Python's own catch_warnings is one for all threads,
    so that they would have to wait for each other.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


def _orientation(image: Image) -> int:
    """By EXIF alone: as in browsers and the reference, what XMP says of it does not count."""
    _drop_xmp(image)
    try:
        with _quiet:  # of what is damaged in it
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged, in any way
        return 1


def _drop_xmp(image: Image) -> None:
    for name in ("XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)


def serve(request: Mapping[str, Any], send: Callable[..., None]) -> None:
    """In the decoding process: sends the image that is standard input. Raises MediaError."""
    with open(0, "rb", closefd=False) as file:
        file.seek(0)
        image = EncodedImage(file.read(), "it", request["max_pixels"])
    pixels = np.ascontiguousarray(load_image(image))
    high, wide, _ = pixels.shape
    about = {"high": high, "wide": wide, "stride": 3 * wide, "bytes": pixels.nbytes}
    send("frame", {**about, "matrix": [1, 0, 0, 1]}, pixels.data)


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
        return _pixels(image)


def _pixels(image: Image, turn: int = 1) -> Pixels:
    """As RGB, upright by an EXIF orientation. A large image is taken in strips: Pillow would make
    two copies and more of it, none of which a cache holds.
    """
    if image.height * image.width < _LARGE:
        return np.ascontiguousarray(_turned(np.asarray(_rgb(image)), turn))
    wide, high = image.size
    pixels = np.empty((wide, high, 3) if 5 <= turn <= 8 else (high, wide, 3), np.uint8)
    view = _turned(pixels, {6: 8, 8: 6}.get(turn, turn))
    band = max(1, _LARGE // 16 // wide)
    for top in range(0, high, band):
        box = (0, top, wide, min(top + band, high))
        view[top : top + band] = np.asarray(_rgb(image.crop(box)))
    return pixels


def _rgb(image: Image) -> Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _turned(pixels: Pixels, turn: int) -> Pixels:
    """A view of pixels (H, W, 3) that lie as an EXIF orientation says, upright. What it is not, 1
    to 8, turns nothing. 6 and 8 undo each other, the others themselves.
    """
    if 5 <= turn <= 8:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if turn in (3, 4, 7, 8) else 1
    across = -1 if turn in (2, 3, 6, 7) else 1
    return pixels[::down, ::across]


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
