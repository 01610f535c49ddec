"""Pillow's images and arrays as uint8 RGB, as torchvision converts them: depths, palettes,
transparency, orientation.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from mlx_onevision.errors import MediaError, TooLargeError
from mlx_onevision.media.resize import Pixels
from mlx_onevision.media.sources import reason

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 200_000  # pixels; beyond, an image one pixel high would take gigabytes to resize
_LARGE = 1 << 22  # pixels of an image that is taken from Pillow in strips


def check_size(name: str, high: int, wide: int, max_pixels: int) -> None:
    """MediaError for an image without pixels, TooLargeError for one that has too many."""
    if min(high, wide) < 1:
        raise MediaError(f"{name} has no pixels ({wide}x{high})")
    if high * wide > max_pixels:
        millions = f"{high * wide / 1e6:,.0f} megapixels ({wide}x{high})"
        raise TooLargeError(f"{name} has {millions}; at most {max_pixels / 1e6:,.0f} are read")
    if max(high, wide) > MAX_SIDE:
        raise TooLargeError(f"{name} is {wide}x{high} pixels; a side has at most {MAX_SIDE:,}")


@contextmanager
def pillow_errors(name: str, problem: str) -> Generator[None]:
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


def from_pillow(image: Image, max_pixels: int) -> Pixels:
    """A caller's Pillow image, (H, W, 3): not turned by its EXIF, transparency laid on white.

    Raises MediaError for one that cannot be read or converted, TooLargeError beyond ``max_pixels``.
    """
    from PIL import Image as module

    name = f"the {image.width}x{image.height} PIL image"
    check_size(name, image.height, image.width, max_pixels)
    with pillow_errors(name, f"cannot read {name}"):  # its file may be read only now
        image = eight_bits(image, name)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = module.new("RGBA", image.size, (255, 255, 255, 255))
            image = module.alpha_composite(white, image.convert("RGBA"))
        return upright_rgb(image)


def from_array(source: object, max_pixels: int) -> Pixels:
    """A caller's array, uint8 or uint16 with 1, 3 or 4 channels first or last, as (H, W, 3);
    transparency is laid on white.

    Raises MediaError for anything else, TooLargeError beyond ``max_pixels``.
    """
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
        advice = "" if array.dtype.kind == "b" else "scale to 0..255 and "
        advice = "multiply 0..1 by 255 and " if array.dtype.kind == "f" else advice
        raise MediaError(f"{name} holds {array.dtype}, not uint8; {advice}use astype('uint8')")
    if array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    elif array.shape[2] not in (1, 3, 4):
        raise MediaError(f"{name} has no axis of 1, 3 or 4 channels, first or last")
    check_size(name, array.shape[0], array.shape[1], max_pixels)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        return _on_white(array)
    return np.ascontiguousarray(array)


def eight_bits(image: Image, name: str) -> Image:
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
    # A TIFF's tags: 258, bits a sample; 339, whether they are signed; 262, whether 0 is white.
    tags = getattr(image, "tag_v2", {})
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


def upright_rgb(image: Image, turn: int = 1) -> Pixels:
    """An image of at most 8 bits a channel as RGB (H, W, 3), turned upright.

    turn : its EXIF orientation, 1 to 8.

    A large image is converted in strips: Pillow would make two copies and more of the whole, none
    of which fits into a processor's cache.
    """
    if image.height * image.width < _LARGE:
        return np.ascontiguousarray(_upright(np.asarray(_as_rgb(image)), turn))
    wide, high = image.size
    pixels = np.empty((wide, high, 3) if 5 <= turn <= 8 else (high, wide, 3), np.uint8)
    view = _upright(pixels, {6: 8, 8: 6}.get(turn, turn))
    band = max(1, _LARGE // 16 // wide)
    for top in range(0, high, band):
        box = (0, top, wide, min(top + band, high))
        view[top : top + band] = np.asarray(_as_rgb(image.crop(box)))
    return pixels


def _as_rgb(image: Image) -> Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(pixels: Pixels, turn: int) -> Pixels:
    """A view of pixels (H, W, 3) turned upright by their EXIF orientation; a number beside 1 to 8
    turns nothing. 6 and 8 undo each other, each other number itself.
    """
    if 5 <= turn <= 8:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if turn in (3, 4, 7, 8) else 1
    across = -1 if turn in (2, 3, 6, 7) else 1
    return pixels[::down, ::across]


def _on_white(rgba: Pixels) -> Pixels:
    """RGBA (H, W, 4) on white, (H, W, 3): in float32, rounded where torchvision's ``to_dtype``
    rounds (``convert_image_dtype``: times 256 - 1e-3, truncated).
    """
    scale, unscale = np.float32(1 / 255), np.float32(255 + 1.0 - 1e-3)
    out = np.empty((*rgba.shape[:2], 3), np.uint8)
    for row in range(len(rgba)):
        values = rgba[row].astype(np.float32) * scale
        alpha = values[:, 3:]
        out[row] = (values[:, :3] * alpha + (1 - alpha)) * unscale
    return out
