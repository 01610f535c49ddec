"""The calls of a model for programs on asyncio, each made on a thread. A task that is cancelled
cancels its request.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlx_onevision.errors import CancelledError

if TYPE_CHECKING:
    from mlx_onevision.embed.embedder import Item
    from mlx_onevision.embed.embeddings import Embeddings
    from mlx_onevision.engine.generation import Generation, Stream

Result = TypeVar("Result")


class _Calls(Protocol):
    """What the calls here are made of; see the methods of Model."""

    def stream(self, *args: Any, **given: Any) -> Any: ...

    def embed(self, *args: Any, **given: Any) -> "Embeddings": ...


class AsyncCalls:
    """The calls of :class:`~mlx_onevision.model.Model` for asyncio."""

    async def agenerate(
        self: _Calls, prompt: str | None = None, **given: Any
    ) -> "Generation | list[Generation]":
        """As :meth:`Model.generate`: one answer, or those of a ``batch``.

        prompt, given : as there. A task that is cancelled ends its requests within a token.

        Raises:
            OneVisionError: as there.
        """
        streams: Stream | list[Stream]
        streams = await _cancellable(partial(self.stream, prompt), given)
        with _cancelled_at_the_end(streams if isinstance(streams, list) else [streams]):
            if isinstance(streams, list):
                return [await asyncio.to_thread(stream.outcome) for stream in streams]
            return await asyncio.to_thread(streams.result)

    async def astream(self: _Calls, prompt: str | None = None, **given: Any) -> AsyncGenerator[str]:
        """As :meth:`Model.stream`, for one conversation: ``async for piece in model.astream(…)``.
        An iteration that ends early cancels the answer.

        prompt, given : as there.

        Raises:
            OneVisionError: as there, once it is iterated.
        """
        stream: Stream = await _cancellable(partial(self.stream, prompt), given)
        with _cancelled_at_the_end([stream]):
            while (piece := await asyncio.to_thread(next, stream, None)) is not None:
                yield piece

    async def aembed(self: _Calls, items: "Iterable[Item]", **given: Any) -> "Embeddings":
        """As :meth:`Model.embed`.

        items, given : as there. A task that is cancelled ends the work between groups of tiles.

        Raises:
            OneVisionError: as there.
        """
        return await _cancellable(partial(self.embed, items), given)


async def _cancellable(call: Callable[..., Result], given: dict[str, Any]) -> Result:
    """What ``call`` returns, on a thread; where the task is cancelled, its next check ends it."""
    gone, check = threading.Event(), given.get("check")

    def both() -> None:
        if gone.is_set():
            raise CancelledError("the task was cancelled")
        if check is not None:
            check()

    try:
        return await asyncio.to_thread(call, **{**given, "check": both})
    finally:
        gone.set()


@contextmanager
def _cancelled_at_the_end(streams: "list[Stream]") -> Generator[None]:
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()
