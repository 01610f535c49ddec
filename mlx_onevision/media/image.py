"""Pictures in, tiles out: reading what a caller calls an image, and cutting it as the model saw it.

Two routes, as in the reference (transformers with its torchvision backend):

- A file (path, URL, bytes, base64): turned upright by its EXIF orientation, transparency dropped
  (the colours under it show). For 8-bit JPEG, PNG, GIF and still WebP this gives the levels that
  torchvision's decoder gives. Where that one has no sensible answer, Pillow's is taken: 16-bit PNG
  (torchvision hands on 0..65535), animations (the first frame), the transparent colour of a GIF,
  BMP, TIFF, AVIF, HEIC (torchvision refuses them); and WebP is turned by its EXIF, too.
- A picture in memory (PIL image, array): taken as it stands, not turned; transparency is laid on
  white. Arrays are uint8 with 1, 3 or 4 channels; where both the first and the last axis could be
  the channels, the first is. Float arrays are refused: the reference scales them as if they held
  0..255 and resizes them without rounding, which nobody means.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media.anyres import fitted_size, select_best_resolution
from mlx_onevision.media.resize import Pixels, resize, resize_on_square
from mlx_onevision.media.sources import bare_base64, data_uri, download, is_url, quoted

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image | NDArray[Any]"
)

_OPENING = Lock()  # catch_warnings is one for all threads
MAX_PIXELS = 178_956_970  # where Pillow, too, refuses a file as a decompression bomb
MAX_SIDE = 200_000  # beyond, a picture one pixel high would take gigabytes to resize

# What Pillow may open, the usual first. It knows more, but to draw an EPS it starts a program.
_KINDS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "ICO", "JPEG2000", "QOI", "AVIF")
_HEIC = re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL)
# EXIF orientation to the PIL.Image.Transpose that undoes it, by name.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Pixels:
    """``source`` as uint8 RGB (H, W, 3).

    source : path, http(s) URL, data URI or base64 text, bytes, binary file, PIL image, or array.
    max_pixels : more than that is not decoded.

    Raises:
        MediaError: whatever keeps it from being read, in one sentence that names it.
        TooLargeError: more pixels (known before decoding) or bytes (of a download) than allowed.
    """
    from PIL.Image import Image

    if isinstance(source, Image):
        return _from_object(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "the image given as bytes", max_pixels)
    if isinstance(source, str):
        return _from_text(source, max_pixels)
    if isinstance(source, os.PathLike):
        return _from_path(Path(source), max_pixels)
    if hasattr(source, "read"):
        file: Any = source
        named = isinstance(getattr(file, "name", None), str)
        name = quoted(file.name) if named else "the image given as a file object"
        return _from_bytes(file.read(), name, max_pixels)
    return _from_array(source, max_pixels)


def tile_image(image: Pixels, config: ImageConfig) -> Pixels:
    """The tiles of an image that stands alone in its conversation: uint8 (1 + tiles, S, S, 3).

    The first is the whole image squeezed into one tile. The others are cut, row by row, from the
    image fitted into the best of the grids and centred on black.
    """
    tile = config.size
    high, wide = select_best_resolution(_size(image), config.image_grid_pinpoints)
    inner = fitted_size(_size(image), (high, wide))
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    canvas = np.zeros((high, wide, 3), np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = resize(image, inner)
    rows, cols = high // tile, wide // tile
    tiles = np.empty((1 + rows * cols, tile, tile, 3), np.uint8)
    tiles[0] = resize(image, (tile, tile))
    cut = canvas.reshape(rows, tile, cols, tile, 3).swapaxes(1, 2)
    tiles[1:].reshape(rows, cols, tile, tile, 3)[...] = cut
    return tiles


def pad_to_square_tile(image: Pixels, config: ImageConfig) -> Pixels:
    """The one tile of an image among several: uint8 (1, S, S, 3), padded with the mean colour."""
    fill = [int(mean * 255) for mean in config.image_mean]
    return resize_on_square(image, config.size, fill)[None]


@lru_cache(maxsize=8)
def normalization_table(config: ImageConfig) -> NDArray[np.float32]:
    """The pixel value of each level in each channel: float32 (256, 3), read-only.

    The reference folds the rescaling into mean and standard deviation, all in float32, which is
    up to 6e-8 from doing one after the other.
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


def _size(image: Pixels) -> tuple[int, int]:
    return image.shape[0], image.shape[1]


def _check_size(name: str, high: int, wide: int, max_pixels: int) -> None:
    if min(high, wide) < 1:
        raise MediaError(f"{name} has no pixels ({wide}x{high})")
    if high * wide > max_pixels:
        millions = f"{high * wide / 1e6:,.0f} megapixels ({wide}x{high})"
        raise TooLargeError(f"{name} has {millions}; at most {max_pixels / 1e6:,.0f} are read")
    if max(high, wide) > MAX_SIDE:
        raise TooLargeError(f"{name} is {wide}x{high} pixels; a side has at most {MAX_SIDE:,}")


def _from_text(text: str, max_pixels: int) -> Pixels:
    """A string is a URL, a data URI, a path, or, if it can be nothing else, base64."""
    if is_url(text):
        return _from_bytes(download(text), quoted(text), max_pixels)
    if text.startswith("data:"):
        return _from_bytes(data_uri(text), "the image in the data URI", max_pixels)
    data = bare_base64(text)
    if data is not None:
        name = f"{quoted(text)} (read as base64, for there is no such file)"
        return _from_bytes(data, name, max_pixels)
    if not text or "\0" in text:
        raise MediaError(f"{quoted(text)} is not the path of an image")
    return _from_path(Path(text), max_pixels)


def _from_path(path: Path, max_pixels: int) -> Pixels:
    path = Path(os.path.expanduser(path))
    name = quoted(str(path))
    try:
        if path.is_dir():
            raise MediaError(f"{name} is a folder, not an image")
        if not path.exists():
            raise MediaError(f"{name} does not exist; give the path of an image")
        with path.open("rb") as file:
            return _from_file(file, name, max_pixels)
    except (OSError, ValueError, RuntimeError) as error:
        raise MediaError(f"cannot read {name}: {_reason(error)}") from error


def _from_bytes(data: bytes, name: str, max_pixels: int) -> Pixels:
    return _from_file(BytesIO(data), name, max_pixels)


def _from_file(file: BinaryIO, name: str, max_pixels: int) -> Pixels:
    """The file's route: upright by EXIF, transparency dropped."""
    from PIL import Image, UnidentifiedImageError

    head = file.read(16)
    file.seek(0)
    if not head:
        raise MediaError(f"{name} is empty (0 bytes)")
    kinds = _KINDS
    if _HEIC.match(head):
        _learn_heic(name)
        kinds = ("HEIF",)
    try:
        with _OPENING, warnings.catch_warnings():
            # Pillow warns from half of the limit on; ours is checked below, before any decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=kinds)
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{name} has too many pixels: {_reason(error)}") from error
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: Pillow built without a kind
        raise MediaError(f"{name} is not an image of a kind that can be read") from error
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # a plugin's parser can fail in any way on a broken file
        raise MediaError(f"cannot read {name}: {_reason(error)}") from error
    with image:
        _check_size(name, image.height, image.width, max_pixels)
        try:
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(0x0112, 1))
            # Of no use once it is dropped, but Pillow would warn that it is.
            image.info.pop("transparency", None)
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return np.asarray(rgb.transpose(Image.Transpose[turn]) if turn else rgb)
        except (MemoryError, RecursionError):
            raise
        except Image.DecompressionBombError as error:
            raise TooLargeError(f"{name} has too many pixels: {_reason(error)}") from error
        except Exception as error:
            raise MediaError(f"{name} is damaged: {_reason(error)}") from error


def _learn_heic(name: str) -> None:
    try:
        heif = import_module("pillow_heif")
    except ImportError:
        raise MediaError(
            f"{name} is a HEIC image, which needs pillow-heif; pip install 'mlx-onevision[heic]'"
        ) from None
    heif.register_heif_opener()


def _from_object(image: Image, max_pixels: int) -> Pixels:
    """A PIL image's route: as it stands, transparency laid on white."""
    from PIL import Image as module

    name = f"the {image.width}x{image.height} PIL image"
    _check_size(name, image.height, image.width, max_pixels)
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = module.new("RGBA", image.size, (255, 255, 255, 255))
            image = module.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # its file may be read only now, and be damaged
        raise MediaError(f"cannot read {name}: {_reason(error)}") from error


def _from_array(source: object, max_pixels: int) -> Pixels:
    """An array's route: uint8, 1, 3 or 4 channels first or last; the fourth laid on white."""
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
    if array.dtype != np.uint8:
        way = "multiply 0..1 by 255 and " if array.dtype.kind == "f" else ""
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


def _reason(error: object) -> str:
    """An error's own words, fit for the end of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(". ")
