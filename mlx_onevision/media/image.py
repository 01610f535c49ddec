"""Reading what a caller gives as an image.

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

All threads together hold at most ``MEMORY`` bytes of images that are being decoded, or a single
image of any size: 7 bytes a pixel, more for some kinds (see :func:`_opened`).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from io import BufferedReader, BytesIO, FileIO
from tempfile import TemporaryFile
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.files import AVIF_BRANDS, HEIF_BRANDS, sniff
from mlx_onevision.media.cache import array_key
from mlx_onevision.media.decoder import Limits, decode_image
from mlx_onevision.media.image_parts import (
    ICON,
    check_frames,
    check_pages,
    icon_sizes,
    kind_of,
    orientation,
    reduced,
)
from mlx_onevision.media.parallel import Budget, no_check
from mlx_onevision.media.resize import Pixels
from mlx_onevision.media.rgb import (
    check_size,
    eight_bits,
    from_array,
    from_pillow,
    pillow_errors,
    upright_rgb,
)
from mlx_onevision.media.sources import IMAGE_KINDS, is_file, open_source

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # where Pillow, too, refuses a file as a decompression bomb
MAX_READ = 64 << 20  # bytes of a file that are read before it is opened as an image
MEMORY = 1 << 30  # bytes of images being decoded, of all threads
_TRIMMED = 16 << 20  # bytes of an image whose freed memory is returned to the system at once

_memory = Budget(MEMORY)

# What Pillow may open, the usual first. It knows more, but to draw an EPS it starts a program.
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "JPEG2000", "QOI", "AVIF")
_COUNTED = ("WEBP", "AVIF")  # Pillow knows the number of their frames as soon as it opens them
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I": 16, "F": 16}  # bytes a pixel in Pillow; else 4


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An image whose pixels are known: ``pixels`` as :func:`load_image` returns them, uint8 RGB
    (H, W, 3). Of a bare array three pixels high, the first axis would be taken for the channels.
    """

    pixels: Pixels


class PixelCount:
    """Counts the pixels that are decoded for one request, of which it may have ``most``; from any
    thread.
    """

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._lock = Lock()

    def take(self, pixels: int) -> None:
        """Adds an image's pixels. Raises TooLargeError beyond the most."""
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
    """The bytes of an image's file, which is decoded only where its tiles are not cached.

    name : what errors call it.
    max_pixels : the most that it may have. together : counts those of the request's other images.
    limits : for the process that decodes any kind but PNG, JPEG, WebP, GIF and BMP; None: every
        kind is decoded in this process.
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
def reading_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Generator[Pixels]:
    """:func:`load_image` as a context: until it is left, the pixels count against ``MEMORY``, for
    which other threads wait.
    """
    from PIL.Image import Image

    with ExitStack() as held:
        if isinstance(source, DecodedImage):
            high, wide, _ = source.pixels.shape
            check_size("the decoded image", high, wide, max_pixels)
            yield source.pixels
        elif isinstance(source, EncodedImage):
            most = min(max_pixels, source.max_pixels)
            yield _decoded(source.data, replace(source, max_pixels=most), held)
        elif isinstance(source, Image):
            yield from_pillow(source, max_pixels)
        elif not is_file(source):
            yield from_array(source, max_pixels)
        else:
            data, name = open_source(source, "image")
            if isinstance(data, FileIO):
                held.enter_context(data)
            yield _decoded(data, EncodedImage(b"", name, max_pixels), held)


def identify_image(
    source: ImageSource,
) -> tuple[Hashable | None, Callable[[], AbstractContextManager[Pixels]]]:
    """A key that is equal for images of equal contents, and a function that reads the image (as
    :func:`reading_image`, whose errors both raise). The contents are the bytes of a file, or the
    pixels of an image in memory; the key of a file of more than ``MAX_READ`` bytes is None.
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
        with data, pillow_errors(name, f"cannot read {name}"):
            data = data.readall()  # once, so that these are the bytes that are decoded
    read = partial(reading_image, EncodedImage(data, name, MAX_PIXELS))
    return ("file", sha256(data).digest()), read


class _TooHeavyError(Exception):
    """The image takes more than ``MEMORY``, and ``limits`` allow another process to decode it."""


def _decoded(data: bytes | FileIO, about: EncodedImage, held: ExitStack) -> Pixels:
    """The pixels of a file, in this process or in another one.

    about : everything but the bytes; its own ``data`` are not used.
    held : takes over the memory that the pixels count for.
    """
    name = about.name
    with pillow_errors(name, f"cannot read {name}"):
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
    """As :func:`_decoded`, in this process. ``head`` : the file's first bytes."""
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
    """The pixels of a file that Pillow opens as one of ``kinds``.

    exif : its block of EXIF; None where Pillow has to be asked for it.
    extra : bytes that decoding holds for each pixel beside Pillow's own 1 to 4 and RGB's 3.
    """
    from PIL import Image, UnidentifiedImageError

    name = about.name
    with pillow_errors(name, f"cannot read {name}"):
        if (start := file.read(4)) == ICON:
            for high, wide in icon_sizes(file):
                check_size(name, high, wide, about.max_pixels)
        elif start[:2] in (b"II", b"MM"):
            check_pages(file, name)
        file.seek(0)
        try:
            with _quiet:  # Pillow warns of metadata, and from half of its own limit on
                image = Image.open(file, formats=kinds)
        except (UnidentifiedImageError, KeyError) as error:  # KeyError: Pillow built without a kind
            raise MediaError(
                f"{name} is not an image of the kinds that are read ({IMAGE_KINDS})"
            ) from error
    with image, ExitStack() as taken:
        check_size(name, image.height, image.width, about.max_pixels)
        check_frames(getattr(image, "n_frames", 1) if image.format in _COUNTED else 1, name)
        count = image.height * image.width
        size = count * (_STORED.get(image.mode, 4) + 3 + extra)
        if size > MEMORY and about.limits is not None:
            raise _TooHeavyError
        if about.together is not None:
            about.together.take(count)
        taken.enter_context(_holding(size, about.check))
        with pillow_errors(name, f"{name} is damaged"):
            _drop_xmp(image)  # by which Pillow turns a TIFF as it loads it
            image.load()
            check_size(name, image.height, image.width, about.max_pixels)  # as it was decoded
            if exif is None and image.format == "WEBP":
                exif = image.info.get("exif", b"")
            turn = _orientation(image) if exif is None else orientation(exif)
            # Transparency is dropped; without this Pillow would warn of that.
            image.info.pop("transparency", None)
            pixels = upright_rgb(eight_bits(image, name), turn)
        held.push(taken.pop_all())
        return pixels


@contextmanager
def _holding(size: int, check: Callable[[], None]) -> Generator[None]:
    """Counts ``size`` bytes against ``MEMORY``, and returns them to the system at the end."""
    try:
        with _memory.holding(size, check):
            yield
    finally:
        if size >= _TRIMMED:
            _trim()()


@cache
def _trim() -> Callable[[], object]:
    """Has the C library return freed memory to the system. glibc would keep that of each thread;
    macOS's has no such function, and needs none for blocks as large as Pillow's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return no_check if trim is None else partial(trim, 0)


class _Quiet:
    """Suppresses warnings while any thread is in it. Python's own ``catch_warnings`` sets and
    restores state of the whole process, so that threads would have to take turns.
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
    """The orientation 1 to 8 by EXIF alone: as in browsers and the reference, XMP's is ignored."""
    _drop_xmp(image)
    try:
        with _quiet:  # Pillow warns of damage
            return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged, in any way
        return 1


def _drop_xmp(image: Image) -> None:
    for name in ("XML:com.adobe.xmp", "xmp"):
        image.info.pop(name, None)


def serve(request: Mapping[str, Any], send: Callable[..., None]) -> None:
    """In the decoding process: sends the image that is standard input. Raises MediaError.

    request : as :mod:`decoder_process` gets it. send : its function that writes a message.
    """
    with open(0, "rb", closefd=False) as file:
        file.seek(0)
        image = EncodedImage(file.read(), "it", request["max_pixels"])
    pixels = np.ascontiguousarray(load_image(image))
    high, wide, _ = pixels.shape
    about = {"high": high, "wide": wide, "stride": 3 * wide, "bytes": pixels.nbytes}
    send("frame", {**about, "matrix": [1, 0, 0, 1]}, pixels.data)
