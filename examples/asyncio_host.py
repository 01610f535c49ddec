"""A host on asyncio: several questions about a picture side by side, and vectors meanwhile.

python examples/asyncio_host.py [PICTURE [BACKEND]]
"""

import asyncio
import sys
from pathlib import Path

from mlx_onevision.plugins import open_backend
from mlx_onevision.plugins.interface import Backend, EmbedRequest, GenerateRequest, Media, TextEvent

QUESTIONS = ("What is in the image?", "How many shapes are there?", "Where is the star?")


async def ask(backend: Backend, question: str, picture: Media) -> str:
    text = ""
    # A task that is cancelled here takes its request with it.
    async with backend.generate(GenerateRequest.ask(question, picture)) as events:
        async for event in events:
            if isinstance(event, TextEvent):
                text += event.delta
        await events.aresult()  # raises what went wrong, if something did
    return text


async def main(
    picture: str = str(Path(__file__).with_name("shapes.png")), name: str = "engine"
) -> None:
    media = Media("image", data=Path(picture).read_bytes())
    with open_backend(name) as backend:
        # What waits for its result goes to a thread.
        embedding = asyncio.create_task(asyncio.to_thread(backend.embed, EmbedRequest([media])))
        answers = await asyncio.gather(*(ask(backend, q, media) for q in QUESTIONS))
        embedded = await embedding
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer}")
    print(f"A vector of {embedded.dim} numbers in the space {embedded.space}.")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    asyncio.run(main(*sys.argv[1:]))
