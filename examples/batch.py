"""Asks several things at once, about pictures, a video and nothing: a JSON object for each.

Each is answered as it would be alone; one that cannot be says why, and the others are answered.

    python examples/batch.py [MODEL]
"""

import json
import sys
from pathlib import Path
from typing import Any

from mlx_onevision import Options, load

HERE = Path(__file__).parent


def asked(question: str, **medium: Any) -> list[dict[str, Any]]:
    """A conversation of one turn; ``medium`` is ``image`` or ``video``, and where it is."""
    blocks = [{"type": kind, kind: source} for kind, source in medium.items()]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}]


def main(model: str = "demo") -> None:
    rows = [
        asked("What is in the image?", image=HERE / "shapes.png"),
        asked("How many shapes are there?", image=HERE / "shapes.png"),
        asked("How does the circle move?", video=HERE / "circle.mp4"),
        asked("What is in the image?", image=HERE / "missing.png"),
        "Hello!",
    ]
    # What holds for all of them is said once, and what holds for one in its place.
    options = [Options() for _ in rows]
    options[2]["num_frames"] = 8
    options[4]["system"] = "You are brief."
    for answer in load(model).generate(batch=rows, options=options, max_tokens=64):
        result = {"text": answer.text} if answer.error is None else {"error": str(answer.error)}
        print(json.dumps({**result, "tokens": answer.usage.prompt_tokens}))


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
