"""Images to compare on: sizes that have gone wrong somewhere, and pictures of those sizes."""

from functools import cache

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (height, width)

# Small, thin, long, prime, square, common; and sizes at which unpadding by truncation instead of
# by the reference's rounding loses a row or a column (for tiles of 56 pixels, patches of 14).
ROUNDING = [(328, 205), (205, 328), (376, 235), (268, 201), (376, 47), (244, 183)]
CORE: list[Size] = [
    (1, 1),
    (1, 5000),
    (5000, 1),
    (30, 900),
    (900, 30),
    (2000, 3000),
    (337, 511),
    (56, 56),
    (333, 334),
    *ROUNDING[:3],
]
# For what needs a few images and many checkpoints: the base tile alone, strips, a full grid that is
# interpolated, one that is not.
FEW: list[Size] = [(1, 1), (1, 5000), (900, 30), (337, 511), (333, 334), (328, 205)]
SIZES: list[Size] = [
    *CORE,
    *ROUNDING[3:],
    (2, 2),
    (1, 2),
    (2, 1),
    (3, 1),
    (1, 37),
    (53, 1),
    (7, 1999),
    (1999, 7),
    (40, 1000),
    (1000, 40),
    (13, 17),
    (55, 57),
    (57, 55),
    (56, 57),
    (57, 56),
    (28, 28),
    (100, 100),
    (112, 112),
    (111, 113),
    (168, 168),
    (169, 168),
    (168, 224),
    (224, 168),
    (280, 280),
    (281, 281),
    (336, 336),
    (337, 337),
    (335, 112),
    (112, 336),
    (480, 640),
    (640, 480),
    (720, 1280),
    (1280, 720),
    (1440, 2560),
    (1080, 1920),
    (899, 1024),
    (1009, 1013),
    (997, 331),
    (331, 997),
    (61, 241),
    (241, 61),
    (127, 509),
    (1500, 1000),
    (768, 768),
    (3000, 2000),
]


@cache
def picture(size: Size, seed: int = 0) -> Image.Image:
    """An RGB picture with gradients, rectangles and noise: every kind of edge to resample.

    Whole numbers only, and no library's random numbers: the same bytes on any machine, which
    recorded results rely on.
    """
    height, width = size
    across = np.arange(width, dtype=np.uint32)[None, :]
    down = np.arange(height, dtype=np.uint32)[:, None]
    salt = np.uint32(0x85EBCA77 * (seed + 1) % 2**32)
    noise = _scramble(across * 0x9E3779B1 + _scramble(down + salt))
    draw = iter(
        _scramble(np.arange(64, dtype=np.uint32) + 977 * seed + 31 * height + width).tolist()
    )
    pixels = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        right, fall = next(draw) % 5, next(draw) % 4
        slope = across * 220 // width * right + down * 220 // height * fall
        pixels[..., channel] = slope // max(right + fall, 1) + noise % 32
    for _ in range(6):
        top, left = next(draw) % height, next(draw) % width
        bottom, right = top + 1 + next(draw) % height, left + 1 + next(draw) % width
        colour = next(draw)
        for channel in range(3):
            block = pixels[top:bottom, left:right, channel]
            block[:] = (colour >> 8 * channel & 255) // 16 * 15 + block % 16
    return Image.fromarray(pixels)


def _scramble(values: np.ndarray) -> np.ndarray:
    """A 32-bit integer hash, element by element."""
    values = values.astype(np.uint32)
    values = (values ^ values >> 16) * np.uint32(0x7FEB352D)
    values = (values ^ values >> 15) * np.uint32(0x846CA68B)
    return values ^ values >> 16


def ask(*images: Image.Image, text: str = "What is in this image?") -> list[dict]:
    """One user turn with these images and a question."""
    content: list[dict] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def footage(frames: int, size: Size, seed: int = 0) -> np.ndarray:
    """A video, uint8 (frames, H, W, 3), each frame another picture."""
    return np.stack([np.asarray(picture(size, seed + n)) for n in range(frames)])


def said(role: str, *content: object) -> dict:
    """One message; texts as strings, pictures as images, arrays and lists as videos."""

    def block(part: object) -> dict:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        kind = "video" if isinstance(part, np.ndarray | list) else "image"
        return {"type": kind, kind: part}

    return {"role": role, "content": [block(part) for part in content]}


def recorded_conversations() -> dict[str, list[dict]]:
    """What tests/reference/model holds the reference's results for."""
    sizes = [(1, 1), (5000, 1), (30, 900), (337, 511), (333, 334), (328, 205)]
    conversations = {f"{height}x{width}": ask(picture((height, width))) for height, width in sizes}
    conversations["two images"] = ask(picture((480, 640)), picture((61, 241)), text="Which is it?")
    conversations["text"] = ask(text="How many words are in this sentence?")
    return conversations
