"""The last responses, kept in memory so that a conversation can go on from one of them."""

import json
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mlx_onevision.plugins.contract.requests import Media, Message
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.request_body import count_values
from mlx_onevision.plugins.hosts.http.responses.types import ResponseObject

MAX_RESPONSES = 256
MAX_STORED_BYTES = 256 << 20  # of all responses; media that several have are counted for each
PART_OVERHEAD_BYTES = 512  # that a part takes besides its characters
VALUE_OVERHEAD_BYTES = 128  # that a value of the body, or a name, takes besides its characters


@dataclass(frozen=True)
class StoredResponse:
    """A response and the conversation up to it, without instructions.

    names : of the functions that were called in it, by the calls' ids. called : of those that were
        called since the user's last message.
    """

    body: ResponseObject
    messages: Sequence[Message]
    names: Mapping[str | None, str]
    called: frozenset[str]

    @property
    def own_calls(self) -> dict[str | None, str]:
        """The names of the functions that the response itself calls, by the calls' ids."""
        items = self.body["output"]
        return {one["call_id"]: one["name"] for one in items if one["type"] == "function_call"}

    @cached_property
    def size(self) -> int:
        """Bytes in memory, about: all of it counts, as a client may make any of it long."""
        parts = [part for message in self.messages for part in message.parts]
        texts = (
            (part.url or part.data or part.path or "") if isinstance(part, Media) else part
            for part in parts
        )
        names = [name for pair in self.names.items() for name in pair]
        body = json.dumps(self.body).encode()
        return (
            PART_OVERHEAD_BYTES * len(parts)
            + VALUE_OVERHEAD_BYTES * (len(names) + count_values(body))
            + sum(map(sys.getsizeof, (*texts, *names, body)))  # of a text up to 4 a character
        )


class ResponseMemory:
    """Bounded; the oldest make room. Changed from the event loop alone, read from any thread."""

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORED_BYTES
    ) -> None:
        self._max_responses, self._max_bytes, self._size = max_responses, max_bytes, 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._items: dict[str, StoredResponse] = {}

    def store(self, stored: StoredResponse) -> None:
        self._stored[stored.body["id"]] = stored
        self._items |= {item["id"]: stored for item in stored.body["output"]}
        self._size += stored.size
        while len(self._stored) > self._max_responses or self._size > self._max_bytes:
            self.forget(next(iter(self._stored)))

    def response(self, id: str, param: str | None = None) -> StoredResponse:
        """Raises HTTPError: 404 for one that is not kept."""
        stored = self._stored.get(id)
        if stored is None:
            message = f"the response {id[:80]!r} is not kept here; send all messages"
            raise HTTPError(404, message, "not_found", param)
        return stored

    def item(self, id: str) -> StoredResponse:
        """The response whose output is an item. Raises HTTPError: 404 where it is not kept."""
        stored = self._items.get(id)
        if stored is None:
            message = f"the item {id[:80]!r} is not kept here; send the message itself"
            raise HTTPError(404, message, "not_found", "input")
        return stored

    def forget(self, id: str) -> None:
        """Raises HTTPError: as :meth:`response`."""
        stored = self.response(id)
        del self._stored[id]
        self._size -= stored.size
        for item in stored.body["output"]:
            del self._items[item["id"]]
