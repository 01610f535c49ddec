"""The last responses, kept in memory so that a conversation can go on from one of them."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_onevision.plugins.contract.requests import Media, Message
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.response_types import ResponseObject

MOST = 256  # responses
BYTES = 256 << 20  # of all of them; media that several have are counted for each
PART_BYTES = 512  # that a part takes besides its characters


@dataclass(frozen=True)
class Kept:
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

    @property
    def size(self) -> int:
        parts = [part for message in self.messages for part in message.parts]
        return PART_BYTES * len(parts) + sum(
            len(part.url or part.data or part.path or "") if isinstance(part, Media) else len(part)
            for part in parts
        )


class ResponseMemory:
    """Bounded; the oldest make room. Changed from the event loop alone, read from any thread."""

    def __init__(self, most: int = MOST, size: int = BYTES) -> None:
        self._most, self._bytes, self._size = most, size, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._items: dict[str, Kept] = {}

    def keep(self, kept: Kept) -> None:
        self._kept[kept.body["id"]] = kept
        self._items |= {item["id"]: kept for item in kept.body["output"]}
        self._size += kept.size
        while len(self._kept) > self._most or self._size > self._bytes:
            self.forget(next(iter(self._kept)))

    def response(self, id: str, param: str | None = None) -> Kept:
        """Raises HTTPError: 404 for one that is not kept."""
        kept = self._kept.get(id)
        if kept is None:
            message = f"the response {id[:80]!r} is not kept here; send all messages"
            raise HTTPError(404, message, "not_found", param)
        return kept

    def item(self, id: str) -> Kept:
        """The response whose output is an item. Raises HTTPError: 404 where it is not kept."""
        kept = self._items.get(id)
        if kept is None:
            message = f"the item {id[:80]!r} is not kept here; send the message itself"
            raise HTTPError(404, message, "not_found", "input")
        return kept

    def forget(self, id: str) -> None:
        """Raises HTTPError: as :meth:`response`."""
        kept = self.response(id)
        del self._kept[id]
        self._size -= kept.size
        for item in kept.body["output"]:
            del self._items[item["id"]]
