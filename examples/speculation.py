"""Speculative decoding: whether answers are the same, and how much sooner they come.

    python examples/speculation.py
    python examples/speculation.py --model 7b --draft-model 0.5b --image photo.jpg

Answers of every kind (text, an image, several, a video) with and without, and then the tokens a
second of a text that repeats itself, in interleaved pairs.
"""

import argparse
import statistics
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

import mlx_onevision

HERE = Path(__file__).parent


def conversations(count: int, image: Path, video: Path, seed: int = 0) -> list[dict[str, Any]]:
    """Questions about nothing, one image, two, and a video, in turn."""
    rng = np.random.default_rng(seed)
    media = (
        {},
        {"images": [image]},
        {"images": [image, HERE / "square.png"]},
        {"videos": [video], "num_frames": 4},
    )
    subjects = ("What is there?", "Which colours are there?", "Describe it.", "Count the shapes.")
    endings = ("", " Be brief.", " Name every shape.", " Say it twice.", " Begin on the left.")
    kinds = list(product(subjects, endings, range(len(media))))
    chosen = [kinds[n] for n in rng.permutation(len(kinds))]
    found = [{"prompt": subject + end, **media[kind]} for subject, end, kind in chosen]
    longer = [{**one, "prompt": f"{one['prompt']} {one['prompt']}"} for one in found]
    return list(islice([*found, *longer], count))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft-model")
    parser.add_argument("--dtype")
    parser.add_argument("--image", type=Path, default=HERE / "shapes.png")
    parser.add_argument("--video", type=Path, default=HERE / "circle.mp4")
    parser.add_argument("--answers", type=int, default=100, help="that are compared")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--most", type=int, default=10, help="tokens that are proposed at once")
    parser.add_argument("--pairs", type=int, default=5, help="of runs that are timed")
    given = parser.parse_args()
    model = mlx_onevision.load(given.model, draft_model=given.draft_model, dtype=given.dtype)
    ways = ["prompt_lookup"] + (["draft_tokens"] if given.draft_model else [])
    asked = conversations(given.answers, given.image, given.video)
    for way in ways:
        same = 0
        for conversation in asked:
            plain = model.generate(**conversation, max_tokens=given.tokens)
            settings: dict[str, Any] = {way: given.most, "max_tokens": given.tokens}
            same += plain.tokens == model.generate(**conversation, **settings).tokens
        print(f"{way}: {same} of {len(asked)} answers have the same tokens")
    # The same question again: its answer repeats the first one.
    first = model.generate("What is there?", images=[given.image], max_tokens=given.tokens)
    text = {"type": "text", "text": "What is there?"}
    question = [
        {"role": "user", "content": [{"type": "image", "image": given.image}, text]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": [text]},
    ]
    for way in ways:
        rates: dict[int, list[float]] = {0: [], given.most: []}
        for most in [0, given.most] * (given.pairs + 1):
            settings = {way: most, "max_tokens": given.tokens}
            answer = model.generate(messages=question, **settings)
            rates[most].append(answer.usage.tokens_per_second)
        plain, fast = (statistics.median(list(values)[1:]) for values in rates.values())
        print(
            f"{way}: {plain:.0f} tokens a second without, {fast:.0f} with, {fast / plain:.2f} times"
        )
    model.close()


if __name__ == "__main__":
    main()
