"""Images for tests and for the scripts that record what the reference makes of them.

Made by integer arithmetic of our own, so that they are the same on every machine and under every
release of numpy and Pillow.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

SMALL = (23, 31)  # height and width of the pictures below

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Recorded sizes: down to one pixel, odd margins, exact fits, every grid shape, long strips.
TILED_SIZES = (
    (1, 1), (2, 2), (1, 700), (700, 1), (5, 37), (100, 100), (336, 336), (383, 385), (384, 384),
    (385, 384), (384, 768), (767, 769), (480, 640), (640, 480), (333, 334), (337, 511), (899, 1024),
    (30, 500), (500, 30), (300, 1200), (1200, 290), (820, 369), (369, 820), (1375, 375), (768, 768),
    (1152, 1152), (1080, 1920), (1000, 40), (2304, 384), (50, 2400),
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Pixels:
    """Even noise over all levels, uint8 of ``shape`` (SplitMix64's top byte)."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed << 32)
    with np.errstate(over="ignore"):
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(56)).astype(np.uint8).reshape(shape)


def picture(seed: int, height: int = 150, width: int = 200) -> Pixels:
    """Noise as an image, (height, width, 3)."""
    return noise(height, width, 3, seed=seed)


def picture_file(path: Path, seed: int) -> Path:
    Image.fromarray(picture(seed)).save(path)
    return path


def smooth(high: int, wide: int) -> Pixels:
    """Colour ramps with hard edges, (high, wide, 3): what lossy formats keep well."""
    down, across = np.indices((high, wide))
    channels = (down * 7 + across * 3, 255 - down * 3, across * 5 + (down // 9 % 2) * 90)
    return np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8)


def digest(array: NDArray[Any]) -> Pixels:
    """16 bytes that stand for an array, its shape and its type, as uint8 (16,)."""
    state = hashlib.blake2b(repr((array.shape, array.dtype.str)).encode(), digest_size=16)
    state.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(state.digest(), np.uint8)


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


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


DEEP = ("I;16", "I", "F")  # objects of more than 8 bits, which the reference clamps to 255


def objects() -> dict[str, Image.Image]:
    """A PIL image of every mode that can be turned into RGB, with and without transparency."""
    high, wide = SMALL
    bands = noise(high, wide, 4)
    pictures = {
        mode: _image(mode, bands[..., :count])
        for mode, count in {
            "L": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "RGBA": 4, "CMYK": 4,
            "RGBX": 4,
        }.items()
    }  # fmt: skip
    pictures["PA"].putpalette(noise(768, seed=2).tobytes())
    pictures["1"] = Image.frombytes("1", (wide, high), noise(high, (wide + 7) // 8).tobytes())
    wider = bands[..., 0].astype(np.int64) * 300 - 5000
    pictures["I;16"] = Image.frombytes("I;16", (wide, high), wider.clip(0).astype("<u2").tobytes())
    pictures["I"] = Image.fromarray(wider.astype(np.int32) // 100)
    pictures["F"] = Image.fromarray((wider / 137).astype(np.float32))
    pictures["P"] = _palette()
    pictures["P, one clear index"] = _palette(transparency=3)
    pictures["P, clear by degrees"] = _palette(transparency=bytes(range(0, 240, 6)))
    for mode, clear in (("L", int(bands[0, 0, 0])), ("RGB", tuple(bands[0, 0, :3].tolist()))):
        pictures[f"{mode}, one clear colour"] = pictures[mode].copy()
        pictures[f"{mode}, one clear colour"].info["transparency"] = clear
    turned = pictures["RGB"].copy()
    turned.getexif()[0x0112] = 6
    turned.info["exif"] = turned.getexif().tobytes()
    pictures["RGB, turned by EXIF"] = turned
    return pictures


def arrays() -> dict[str, Pixels]:
    """An array of every shape that stands for a picture."""
    high, wide = SMALL
    return {
        "last": noise(high, wide, 3),
        "first": noise(3, high, wide),
        "either": noise(3, wide, 4),
        "grey last": noise(high, wide, 1),
        "grey first": noise(1, high, wide),
        "alpha last": noise(high, wide, 4),
        "alpha first": noise(4, high, wide),
        "all alphas": np.stack(np.meshgrid(*[np.arange(256)] * 2), -1)[..., [0, 0, 0, 1]].astype(
            np.uint8
        ),
    }


def _image(mode: str, bands: Pixels) -> Image.Image:
    return Image.frombytes(mode, bands.shape[1::-1], bands.tobytes())


def _palette(**info: Any) -> Image.Image:
    high, wide = SMALL
    image = Image.frombytes("P", (wide, high), (noise(*SMALL, seed=1) % 40).tobytes())
    image.putpalette(noise(120, seed=2).tobytes())
    image.info.update(info)
    return image


# What the reference made of them, recorded by reference/record_pixels.py.


RECORD = Path(__file__).parent / "reference" / "pixels.npz"


@cache
def recorded() -> dict[str, NDArray[Any]]:
    """Every array of the record by its name."""
    with np.load(RECORD) as arrays:
        return {name: arrays[name] for name in arrays.files}


def names(kind: str) -> list[str]:
    """The names of all arrays ``kind/…``, without the kind."""
    return [name.partition("/")[2] for name in recorded() if name.startswith(kind + "/")]
