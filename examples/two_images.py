"""Asks questions about two pictures at once. Each is one tile, as several images are.

python examples/two_images.py [PICTURE PICTURE [MODEL]]
"""

import sys
from pathlib import Path

from mlx_onevision import load

QUESTIONS = (
    "What is in the first image?",
    "What is in the second image?",
    "Which image has a star?",
)


def main(
    first: str = str(Path(__file__).with_name("shapes.png")),
    second: str = str(Path(__file__).with_name("square.png")),
    model: str = "demo",
) -> None:
    loaded = load(model)
    for question in QUESTIONS:
        answer = loaded.generate(question, images=[first, second])
        print("?", question)
        print(answer.text)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
