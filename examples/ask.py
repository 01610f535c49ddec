"""Asks one question about one picture.

python examples/ask.py [PICTURE [QUESTION [MODEL]]]
"""

import sys
from pathlib import Path

from mlx_onevision import load


def main(
    picture: str = str(Path(__file__).with_name("shapes.png")),
    question: str = "What is in this image?",
    model: str = "demo",
) -> None:
    answer = load(model).generate(question, images=[picture])
    print(answer.text)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
