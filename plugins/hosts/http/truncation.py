"""``truncation: "auto"``: the oldest turns of a conversation are left out until it fits.

Only the backend knows how many tokens a conversation has, so it is asked again with a shorter one
while the answer is ``context_overflow``.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from mlx_onevision.plugins.contract.requests import GenerateRequest, Message
from mlx_onevision.plugins.contract.results import ErrorEvent, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel, EventStream
from mlx_onevision.plugins.interface import Backend

MEDIA_CHARACTERS = 4000  # characters that an image or a video counts as
MIN_DROPPED_SHARE = 1 / 16  # of the conversation, that is left out at once; at least a turn

_running: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks weakly


def generate_shortened(
    backend: Backend, request: GenerateRequest, notes: list[str]
) -> EventStream[GenerateResult]:
    """As the backend's ``generate``, within an event loop. ``notes`` gets a line on what was left
    out, before the first piece of the answer.
    """
    channel = Channel()
    task = asyncio.get_running_loop().create_task(_forward(backend, request, notes, channel))
    _running.add(task)
    task.add_done_callback(_running.discard)
    return channel.stream()


async def _forward(
    backend: Backend, request: GenerateRequest, notes: list[str], channel: Channel
) -> None:
    own, messages = list(notes), list(request.messages)
    while not channel.ended:
        stream = backend.generate(replace(request, messages=messages))
        channel.at_end(stream.cancel)
        shorter = None
        async for event in stream:
            if isinstance(event, ErrorEvent) and event.error.code == "context_overflow":
                shorter = without_oldest(messages)
            if shorter is None:
                channel.put(event)
        if shorter is None:
            return
        messages = shorter
        left = len(request.messages) - len(messages)
        what = "the oldest message was" if left == 1 else f"the {left} oldest messages were"
        notes[:] = [*own, f"{what} left out, for the conversation is longer than the context"]


def without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """A conversation without its oldest turns, each of which a user's message begins; None where
    there is only the last one. A system message that stands before them stays.
    """
    first = int(messages[0].role == "system")
    begins = [at for at in range(first + 1, len(messages)) if messages[at].role == "user"]
    least = sum(map(_size, messages[first:])) * MIN_DROPPED_SHARE
    for at in begins:
        if at == begins[-1] or sum(map(_size, messages[first:at])) >= least:
            return [*messages[:first], *messages[at:]]
    return None


def _size(message: Message) -> int:
    return sum(len(part) if isinstance(part, str) else MEDIA_CHARACTERS for part in message.parts)
