"""What the page on LLaVA-OneVision in the documentation of transformers shows, with this package.

    python examples/as_in_transformers.py [MODEL [CHART SIGN CATS SNOWMAN VIDEO]]

A published model, such as 7b, is asked about the inputs of that page, which are downloaded. The
demo model knows nothing of them: unless others are named, it sees the drawings beside this file.
"""

import sys
from pathlib import Path
from typing import Any

from mlx_onevision import Model, load

ON_THE_PAGE = (
    "https://github.com/haotian-liu/LLaVA/blob/1a91fc274d7c35a9b50b3cb29c4247ae5837ce39/"
    "images/llava_v1_5_radar.jpg?raw=true",
    "https://www.ilankelman.org/stopsigns/australia.jpg",
    "http://images.cocodataset.org/val2017/000000039769.jpg",
    "https://huggingface.co/microsoft/kosmos-2-patch14-224/resolve/main/snowman.jpg",
    "https://huggingface.co/datasets/raushan-testing-hf/videos-test/resolve/main/sample_demo_1.mp4",
)
NAMES = ("shapes.png", "shapes.png", "square.png", "shapes.png", "circle.mp4")
DRAWN = tuple(str(Path(__file__).with_name(name)) for name in NAMES)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(source: str) -> dict[str, str]:
    """A path or an address; a block without one takes it from ``images=``, in order."""
    return {"type": "image", "url": source}


def user(*content: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}


def prompt(model: Model) -> None:
    """Formatting alone: what the chat template makes of a conversation, without its image."""
    question = user({"type": "image"}, text("What’s shown in this image?"))
    answer = assistant("This image shows a red stop sign.")
    print(model.render([question, answer, user(text("Describe the image in more details."))]))


def one_image(model: Model, chart: str) -> None:
    messages = [user(image(chart), text("What is shown in this image?"))]
    print(model.generate(messages=messages, max_tokens=100).text)


def two_conversations(model: Model, sign: str, cats: str, snowman: str) -> None:
    """As one batch, without padding: the first has two turns with an image each, the second one.

    The page once gave the three images as one flat list, which tiled them all: that is
    ``tiling="always"``. In nested form, as here, only the snowman is alone and is tiled.
    """
    first = [
        user(image(sign), text("What is shown in this image?")),
        assistant("There is a red stop sign in the image."),
        user(image(cats), text("What about this image? How many cats do you see?")),
    ]
    second = [user(image(snowman), text("What is shown in this image?"))]
    for answer in model.generate(batch=[first, second], max_tokens=30):
        print(answer.text)


def one_video(model: Model, clip: str) -> None:
    """Eight frames of a file, evenly spread."""
    video = {"type": "video", "path": clip}
    messages = [user(video, text("Why is this video funny?"))]
    print(model.generate(messages=messages, num_frames=8, max_tokens=60).text)


def main(name: str = "demo", *inputs: str) -> None:
    chart, sign, cats, snowman, clip = inputs or (DRAWN if name == "demo" else ON_THE_PAGE)
    model = load(name, dtype="float16")  # half precision
    prompt(model)
    one_image(model, chart)
    two_conversations(model, sign, cats, snowman)
    one_video(model, clip)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    main(*sys.argv[1:])
