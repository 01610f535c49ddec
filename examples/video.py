"""Asks questions about one video, and says which of its frames were looked at.

python examples/video.py [VIDEO [MODEL [FRAMES]]]
"""

import sys
from pathlib import Path

from mlx_onevision import load

QUESTIONS = ("What is in this video?", "How does the circle move?")


def main(
    video: str = str(Path(__file__).with_name("circle.mp4")),
    model: str = "demo",
    frames: str = "16",
) -> None:
    loaded = load(model)
    for question in QUESTIONS:
        answer = loaded.generate(question, videos=[video], num_frames=int(frames))
        print("?", question)
        print(answer.text)
        print(f"  ({answer.usage.media_tokens} tokens of video)")
        for note in answer.notes:
            print("  note:", note)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
