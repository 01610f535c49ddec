"""What the engine reads of a request's media: pictures as their pixels, videos as they are."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from mlx_onevision.plugins.contract.errors import cancelled
from mlx_onevision.plugins.contract.media import Media
from mlx_onevision.plugins.contract.requests import Group
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.turns import Turns

# Of work that waits for nothing but the processor. All requests at once would be hardly faster, for
# Python lets one thread have the interpreter, and whoever speaks to the clients is behind them all.
READERS = max(2, (os.cpu_count() or 1) // 2)


class Desk:
    """A place for so many requests at once to read and prepare at."""

    def __init__(self, readers: int = READERS) -> None:
        self._turns = Turns(readers, sys.maxsize)

    @contextmanager
    def place(self, channel: Channel) -> Iterator[None]:
        """Waits for one, first come first served. Not to be held while waiting for anything else.

        Raises:
            PluginError: ``cancelled``, when the request ends before.
        """
        turn = self._turns.enter()
        channel.at_end(lambda: self._turns.leave_line(turn))
        try:
            if not self._turns.wait(turn):
                raise cancelled()
            yield
        finally:
            self._turns.end(turn)


class Sources(ExitStack):
    """Reads the media of one request, and closes their files at the end."""

    def __init__(self, policy: MediaPolicy, desk: Desk, channel: Channel) -> None:
        super().__init__()
        self._policy, self._desk, self._channel = policy, desk, channel

    def item(self, item: str | Media | Group) -> Any:
        """As :meth:`mlx_onevision.api.Model.embed` takes it; the errors are those of :meth:`of`."""
        if isinstance(item, str):
            return {"type": "text", "text": item}
        if isinstance(item, Media):
            return {"type": item.kind, item.kind: self.of(item)}
        return [self.item(medium) for medium in item.media]

    def of(self, medium: Media) -> Any:
        """Of a picture its pixels, of a video its bytes or its open file.

        Raises:
            PluginError: when the policy does not allow it, or the request has ended.
            OneVisionError: when it cannot be read.
        """
        self._channel.check()
        source = self._policy.open(medium)
        if medium.kind == "video":
            return source if isinstance(source, bytes) else self.enter_context(source)
        from PIL import Image

        from mlx_onevision.media.image import load_image

        with (
            nullcontext() if isinstance(source, bytes) else source,
            self._desk.place(self._channel),
        ):
            # As an object, not an array: of a picture three pixels high one would be ambiguous.
            return Image.fromarray(load_image(source, self._policy.pixels))
