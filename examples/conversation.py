"""Asks several questions about one picture, each answer printed as it comes.

The picture is encoded once: later questions find it, and the conversation so far, in the cache.

    python examples/conversation.py [PICTURE [MODEL]]
"""

import sys
from pathlib import Path
from typing import Any

from mlx_onevision import load

QUESTIONS = ("How many shapes are there?", "Where is the star?", "Which colour is the circle?")


def main(picture: str = str(Path(__file__).with_name("shapes.png")), model: str = "demo") -> None:
    loaded = load(model)
    messages: list[dict[str, Any]] = []
    for question in QUESTIONS:
        content: list[dict[str, str]] = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "path": picture})
        messages.append({"role": "user", "content": content})
        print("?", question)
        answer = loaded.stream(messages=messages)
        for piece in answer:
            print(piece, end="", flush=True)
        usage = answer.result().usage
        print(f"\n  ({usage.cached_tokens} of {usage.prompt_tokens} tokens were in the cache)")
        messages.append({"role": "assistant", "content": answer.result().text})


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
