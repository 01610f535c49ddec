"""Images and videos that were changed anywhere: each is read, or refused in a sentence, and nothing
dies of it.
"""

import io
import os
import random
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
from hostile.sizes import cases
from images import smooth
from PIL import Image
from videos import counting

from mlx_onevision.errors import MediaError
from mlx_onevision.media.decoder import Limits
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.image import EncodedImage, load_image
from mlx_onevision.media.video import load_video

IMAGES: dict[str, dict[str, Any]] = {
    "PNG": {},
    "PNG of a palette": {"mode": "P"},
    "PNG in passes": {"interlace": 1},
    "JPEG": {"quality": 90},
    "JPEG in scans": {"progressive": True},
    "WEBP": {"lossless": True},
    "WEBP of loss": {"quality": 50},
    "GIF": {"mode": "P"},
    "GIF of frames": {"mode": "P", "frames": 3},
    "BMP": {},
}
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


@cache
def image(name: str) -> bytes:
    options = dict(IMAGES[name])
    made = Image.fromarray(smooth(31, 40)).convert(options.pop("mode", "RGB"))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    if "GIF" not in name and name != "BMP":
        options["exif"] = exif
    if frames := options.pop("frames", 0):
        options |= {"save_all": True, "append_images": [made.rotate(9)] * frames}
    file = io.BytesIO()
    made.save(file, name.split()[0], **options)
    return file.getvalue()


def changed(data: bytes, choose: random.Random) -> bytes:
    """``data`` with a few changes of every kind, more often near its beginning."""
    made = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 16])):
        place = int(len(made) * choose.random() ** choose.choice([1, 3]))
        length = choose.choice([1, 2, 4, 9, 40])
        kind = choose.randrange(6)
        if kind == 0:
            made[place : place + 1] = bytes([choose.randrange(256)])
        elif kind == 1:
            order = choose.choice(["big", "little"])
            made[place : place + 4] = choose.choice(NUMBERS).to_bytes(4, order)  # pyright: ignore
        elif kind == 2:
            del made[place : place + length]
        elif kind == 3:
            made[place:place] = choose.randbytes(length)
        elif kind == 4:
            made[place:place] = made[place : place + length] * choose.choice([1, 2, 50])
        else:
            del made[place:]
    return bytes(made)


def with_sums(data: bytes) -> bytes:
    """A PNG with the checksums of what its chunks hold now, so that a decoder gets to see it."""
    made, place = bytearray(data), 8
    while place + 12 <= len(made):
        end = place + 8 + int.from_bytes(made[place : place + 4], "big")
        made[end : end + 4] = zlib.crc32(made[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(made)


def outcome(read: Callable[[Any], Any], source: Any, limit: float = 20) -> str:
    """The sentence of a refusal; nothing where it is read."""
    began = time.monotonic()
    try:
        read(source)
        text = ""
    except MediaError as error:
        text = str(error)
        assert "\n" not in text and 10 < len(text) < 400 and not text.endswith("."), text
    assert time.monotonic() - began < limit
    return text


@pytest.mark.parametrize("name", IMAGES)
def test_changed_images(name: str) -> None:
    choose, whole = random.Random(name), image(name)
    outcomes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(cases(200, 2000)):
            data = changed(whole, choose)
            if name.startswith("PNG") and choose.random() < 0.7:
                data = with_sums(data)
            outcomes.append(outcome(load_image, EncodedImage(data, "the image", 1 << 20)))
    assert 5 < outcomes.count("") < len(outcomes) - 5
    assert all("the image" in text for text in outcomes if text)
    assert load_image(whole).shape in ((31, 40, 3), (40, 31, 3))  # still


def test_the_first_bytes_of_any_kind() -> None:
    for name in IMAGES:
        for length in range(1, 64):
            outcome(load_image, image(name)[:length])
    for kind in ("ts", "mp4", "mkv", "ogv"):
        for length in range(1, 40):
            assert outcome(load_image, counting(2, kind)[:length])


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm", "avi"])
def test_changed_videos(kind: str) -> None:
    """Each in a process of its own, as always; whatever it dies of, there is a sentence."""
    choose, whole = random.Random(kind), counting(20, kind)
    limits, before = Limits(memory=1 << 30, seconds=20.0, threads=1), len(os.listdir("/dev/fd"))

    def read(data: bytes) -> Any:
        return load_video(data, 56, FrameOptions(num_frames=3), limits=limits)

    mutants = [changed(whole, choose) for _ in range(cases(50, 750))]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda data: outcome(read, data, 30), mutants))
    assert 0 < outcomes.count("") < len(outcomes)
    assert len(load_video(whole, 56, limits=limits).tiles) == 20
    assert len(os.listdir("/dev/fd")) <= before
