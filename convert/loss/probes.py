"""What a loss is measured on: a fixed set of conversations about drawn media, and of texts.

Images are computed, so that they are the same everywhere, and unlike each other: smooth colour,
edges, small writing, noise, rough and shaded surfaces. Whoever changes anything here, and so every
measured loss, raises ``VERSION``.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Field = NDArray[np.float64]

VERSION = 1
QUICK = ("shapes", "question", "prose")  # for a result that should differ in nothing at all


@dataclass(frozen=True)
class Probe:
    """A conversation, which the source model answers, or a ``text``, which it only reads."""

    name: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    options: dict[str, Any] = field(default_factory=dict[str, Any])


@cache
def probes() -> tuple[Probe, ...]:
    """All of them, drawn once: that takes seconds."""
    disc = moving_disc(8, 240, 320)
    return (
        about("shapes", "What is in the image?", shapes(252, 336)),
        about("shapes, large", "How many shapes are there?", shapes(900, 1200)),
        about("gradient", "Describe the colours of this picture.", gradient(480, 640)),
        about("page", "Read what is written at the top of the page.", strokes(1024, 768)),
        about("noise", "Is there anything to be seen here?", noise(200, 200)),
        about("landscape", "Décris cette image en une phrase.", landscape(683, 1024)),
        about("panorama", "这张图片里有什么？", landscape(200, 1600, seed=7)),
        about("speck", "Which colour is it?", gradient(40, 40)),
        about(
            "two images",
            "What is in the second image, and how does it differ from the first?",
            shapes(300, 300),
            landscape(480, 640, seed=11),
        ),
        about("video", "How does the circle move?", disc, kind="video", num_frames=8),
        Probe("question", ({"role": "user", "content": "Why is the sky blue?"},)),
        *(Probe(name, text=text) for name, text in TEXTS.items()),
    )


def about(name: str, question: str, *media: Image, kind: str = "image", **options: Any) -> Probe:
    """A question about images or, where ``kind`` is "video", videos, as a probe."""
    content: list[dict[str, Any]] = [{"type": kind, kind: medium} for medium in media]
    content.append({"type": "text", "text": question})
    return Probe(name, ({"role": "user", "content": content},), options=options)


def gradient(height: int, width: int) -> Image:
    """Colour that changes slowly across the image, in other directions for each channel."""
    y, x = _grid(height, width)
    return _image(x, y, 1 - (x + y) / 2)


def shapes(height: int, width: int) -> Image:
    """A red circle, a blue square and a green triangle on a pale ground."""
    y, x = _grid(height, width)
    canvas = np.stack([np.full_like(x, level) for level in (0.93, 0.92, 0.88)], axis=-1)
    aspect = width / height
    canvas[((x - 0.2) * aspect) ** 2 + (y - 0.4) ** 2 < 0.02] = (0.86, 0.12, 0.15)
    canvas[(abs(x - 0.5) * aspect < 0.15) & (abs(y - 0.6) < 0.15)] = (0.12, 0.30, 0.85)
    canvas[(y > 0.25) & (y < 0.6) & (abs(x - 0.8) * aspect < (y - 0.25) / 2)] = (0.13, 0.6, 0.27)
    return _image(*np.moveaxis(canvas, -1, 0))


def strokes(height: int, width: int, seed: int = 1) -> Image:
    """Lines of small dark strokes on white, of the density of a printed page."""
    rng = np.random.default_rng(seed)
    page = np.full((height, width), 0.97)
    line = max(12, height // 40)
    for top in range(line, height - line, line):
        left = line
        end = width - line - int(rng.integers(0, width // 3)) * (rng.random() < 0.2)
        while left < end:
            for _ in range(int(rng.integers(2, 9))):  # a word
                _glyph(page[top : top + line * 2 // 3, left : left + line // 2], rng)
                left += line // 2
            left += line // 2
    return _image(page, page, page)


def noise(height: int, width: int, seed: int = 2) -> Image:
    """Every value of every pixel for itself."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def landscape(height: int, width: int, seed: int = 3) -> Image:
    """Rough surfaces under a shaded sky: detail at every scale, as photographs have it."""
    y, x = _grid(height, width)
    ridge = 0.45 + 0.15 * _rough(1, width, seed)[0]
    land = y > ridge
    ground, cloud = _rough(height, width, seed + 1), _rough(height, width, seed + 2)
    light = 0.55 + 0.3 * (1 - y) + 0.1 * x
    sky = (0.55 + 0.3 * cloud, 0.7 + 0.2 * cloud, 0.95 - 0.05 * cloud)
    soil = (0.45 * ground + 0.15, 0.5 * ground + 0.1, 0.3 * ground + 0.05)
    return _image(*(np.where(land, s * light * 1.3, k) for s, k in zip(soil, sky, strict=True)))


def moving_disc(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """A yellow disc that crosses a slowly changing ground, left to right: (frames, H, W, 3)."""
    ground = gradient(height, width) // 2
    y, x = _grid(height, width)
    images: list[Image] = []
    for number in range(frames):
        centre = 0.15 + 0.7 * number / max(frames - 1, 1)
        image = ground.copy()
        disc = ((x - centre) * width / height) ** 2 + (y - 0.5) ** 2 < 0.03
        image[disc] = (250, 220, 30)
        images.append(image)
    return np.stack(images)


def _grid(height: int, width: int) -> tuple[Field, Field]:
    """Rows and columns from 0 to 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    return y / max(height - 1, 1), x / max(width - 1, 1)


def _image(*channels: Field) -> Image:
    levels = np.stack(channels, axis=-1)
    return np.rint(np.clip(levels, 0, 1) * 255).astype(np.uint8)


def _glyph(box: Field, rng: np.random.Generator) -> None:
    """Draws three strokes between points of a 3 x 3 grid."""
    height, width = box.shape
    if height < 3 or width < 3:
        return
    for _ in range(3):
        (y0, x0), (y1, x1) = rng.integers(0, 3, (2, 2)) / 2
        steps = np.linspace(0, 1, 2 * height)
        rows = ((y0 + (y1 - y0) * steps) * (height - 1)).astype(int)
        cols = ((x0 + (x1 - x0) * steps) * (width * 0.8 - 1)).astype(int)
        box[rows, np.clip(cols, 0, width - 1)] = 0.1


def _rough(height: int, width: int, seed: int) -> Field:
    """Value noise of seven octaves, each 0.65 times as strong as the one before; 0 to 1."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width))
    for octave in range(7):
        cells = 3 << octave
        coarse = rng.random((cells + 1, cells + 1))
        rows = np.linspace(0, cells - 1e-9, height)
        cols = np.linspace(0, cells - 1e-9, width)
        i, j = rows.astype(int), cols.astype(int)
        v, u = (rows - i)[:, None], (cols - j)[None]
        top = coarse[i][:, j] * (1 - u) + coarse[i][:, j + 1] * u
        below = coarse[i + 1][:, j] * (1 - u) + coarse[i + 1][:, j + 1] * u
        total += (top * (1 - v) + below * v) * 0.65**octave
    return (total - total.min()) / max(float(np.ptp(total)), 1e-9)


TEXTS = {
    "prose": (
        "The ferry left at six, while the harbour was still grey. Nobody spoke on deck; the "
        "fishermen had been awake for hours, and the three travellers, who had slept badly in the "
        "waiting room, watched the lamps along the quay go out one after another. By the time the "
        "island came into sight the wind had turned, and the captain took the longer way around."
    ),
    "encyclopaedia": (
        "A lens is a piece of glass or another transparent material whose surfaces are curved, so "
        "that light which passes through it is bent. A convex lens brings parallel rays together "
        "at its focal point; a concave lens spreads them. The focal length depends on the "
        "curvature of both surfaces and on the refractive index of the material."
    ),
    "instructions": (
        "1. Switch the machine off and pull out the plug.\n2. Open the lid on the left side.\n"
        "3. Turn the filter half a turn, take it out and rinse it under warm water.\n"
        "4. Put it back, close the lid, and wait five minutes before you switch it on again."
    ),
    "talk": (
        "- Did you see the picture I sent you?\n- The one with the dog? Yes! Where was that?\n"
        "- Just behind our house, can you believe it? He ran straight into the pond.\n"
        "- Ha, poor thing. Was he all right?\n- Of course. He wanted to do it again."
    ),
    "code": (
        "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n"
        "    middle = len(ordered) // 2\n    if len(ordered) % 2:\n"
        "        return ordered[middle]\n"
        "    return (ordered[middle - 1] + ordered[middle]) / 2\n"
    ),
    "data": (
        '{"station": "North Pier", "date": "2024-03-17", "readings": [{"hour": 6, "wind": 4.2, '
        '"temperature": 7.5}, {"hour": 12, "wind": 6.8, "temperature": 11.0}, {"hour": 18, '
        '"wind": 5.1, "temperature": 9.3}], "unit": {"wind": "m/s", "temperature": "C"}}'
    ),
    "German": (
        "Der Zug nach Freiburg fährt heute von Gleis sieben ab und hat etwa zehn Minuten "
        "Verspätung. Reisende nach Basel steigen bitte in Karlsruhe um; der Anschluss wartet."
    ),
    "French": (
        "Au marché, le samedi matin, la fromagère coupe de larges tranches de comté et raconte à "
        "chacun la même histoire : son grand-père aurait traversé le col en plein hiver."
    ),
    "Chinese": "春天来了，公园里的花都开了。孩子们在草地上放风筝，老人坐在长椅上晒太阳、下象棋。",
    "captions": (
        "A red circle and a blue square. There are two shapes. The star is green. "
        "There is no triangle. A black star, a white circle and an orange triangle."
    ),
}
