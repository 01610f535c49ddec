"""The messages of a request to ``/v1/responses``, earlier ones that it refers to included."""

from collections.abc import Mapping

from mlx_onevision.plugins.contract.requests import Message
from mlx_onevision.plugins.hosts.http.content import call_text, check_count, result_message
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.responses import types
from mlx_onevision.plugins.hosts.http.responses.memory import ResponseMemory, StoredResponse
from mlx_onevision.plugins.hosts.http.responses.schemas import (
    CallItem,
    Item,
    ReferenceItem,
    ResponsesRequest,
    ResultItem,
    UserItem,
)


class Conversation:
    """The messages of a request, with those of kept responses that it refers to. Raises HTTPError:
    404 where one is not kept, 400 for too many messages.

    called : names of the functions that were called since the user's last message.
    """

    def __init__(self, asked: ResponsesRequest, memory: ResponseMemory) -> None:
        self._memory = memory
        self._messages: list[Message] = []
        self._names: dict[str | None, str] = {}  # of functions, by their calls' ids
        self.called: set[str] = set()
        if asked.previous_response_id is not None:
            kept = memory.response(asked.previous_response_id, "previous_response_id")
            self._messages += kept.messages
            self._names |= kept.names
            self.called |= kept.called
        for item in asked.input:
            self._add(item)
        try:
            check_count(sum(1 + len(message.parts) for message in self._messages))
        except ValueError as error:
            raise HTTPError(400, f"input: {error}", param="input") from None

    def _add(self, item: Item) -> None:
        if isinstance(item, CallItem):
            self._call({item.call_id: item.name})
            self._messages.append(Message("assistant", call_text(item.name, item.arguments)))
        elif isinstance(item, ResultItem):
            parts = [part.to_contract() for part in item.output]
            self._messages.append(result_message(self._names.get(item.call_id), parts))
        elif isinstance(item, ReferenceItem):
            kept = self._memory.item(item.id)
            self._messages.append(kept.messages[-1])
            self._call(kept.own_calls)
        else:
            if isinstance(item, UserItem):
                self.called = set()
            self._messages.append(item.to_contract())

    def _call(self, names: Mapping[str | None, str]) -> None:
        self._names |= names
        self.called |= set(names.values())

    def with_instructions(self, instructions: str | None) -> list[Message]:
        """The model knows one system message: what there is besides instructions goes into it."""
        messages = list(self._messages)
        if instructions is not None:
            system = instructions
            if messages[0].role == "system":
                parts = messages.pop(0).parts
                system = f"{system}\n\n{''.join(part for part in parts if isinstance(part, str))}"
            messages.insert(0, Message("system", system))
        return messages

    def keep(self, body: types.ResponseObject) -> None:
        (item,) = body["output"]
        if item["type"] == "function_call":
            self._call({item["call_id"]: item["name"]})
            text = call_text(item["name"], item["arguments"])
        else:
            text = "".join(part["text"] for part in item["content"])
        messages = [*self._messages, Message("assistant", text)]
        self._memory.store(StoredResponse(body, messages, self._names, frozenset(self.called)))
