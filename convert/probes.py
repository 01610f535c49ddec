"""What a loss is measured on: a fixed set of conversations about drawn media, and of texts.

Changing anything here changes every figure that was ever printed: then raise ``VERSION``.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_onevision.convert import probe_images as draw

VERSION = 1
QUICK = ("shapes", "question", "prose")


@dataclass(frozen=True)
class Probe:
    """One prompt. With ``messages`` it is a conversation, which the source model answers; with
    ``text`` it is read as it stands.
    """

    name: str
    messages: tuple[dict[str, Any], ...] = ()
    text: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def probes() -> list[Probe]:
    """All of them, drawn anew."""
    return [
        _about("shapes", "What is in the image?", draw.shapes(252, 336)),
        _about("shapes, large", "How many shapes are there?", draw.shapes(900, 1200)),
        _about("gradient", "Describe the colours of this picture.", draw.gradient(480, 640)),
        _about("page", "Read what is written at the top of the page.", draw.strokes(1024, 768)),
        _about("noise", "Is there anything to be seen here?", draw.noise(200, 200)),
        _about("landscape", "Décris cette image en une phrase.", draw.landscape(683, 1024)),
        _about("panorama", "这张图片里有什么？", draw.landscape(200, 1600, seed=7)),
        _about("speck", "Which colour is it?", draw.gradient(40, 40)),
        _about(
            "two images",
            "What is in the second image, and how does it differ from the first?",
            draw.shapes(300, 300),
            draw.landscape(480, 640, seed=11),
        ),
        _film("video", "How does the circle move?"),
        Probe("question", ({"role": "user", "content": "Why is the sky blue?"},)),
        *(Probe(name, text=text) for name, text in TEXTS.items()),
    ]


def quick_probes() -> list[Probe]:
    """A few of them, for a result that should differ in nothing at all."""
    return [probe for probe in probes() if probe.name in QUICK]


def _about(name: str, question: str, *pictures: draw.Picture) -> Probe:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return Probe(
        name,
        ({"role": "user", "content": [*content, {"type": "text", "text": question}]},),
    )


def _film(name: str, question: str) -> Probe:
    frames = draw.film(8, 240, 320)
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    return Probe(name, ({"role": "user", "content": content},), options={"num_frames": len(frames)})


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
