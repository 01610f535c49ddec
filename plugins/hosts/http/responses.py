"""``POST /v1/responses``, and what is kept of the last of them."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import GenerateRequest, Message
from mlx_onevision.plugins.hosts.http import response_types as types
from mlx_onevision.plugins.hosts.http.content import call_text, check_count, result_message
from mlx_onevision.plugins.hosts.http.errors import HTTPError, to_http_error
from mlx_onevision.plugins.hosts.http.formats import schema_text
from mlx_onevision.plugins.hosts.http.memory import Kept, ResponseMemory
from mlx_onevision.plugins.hosts.http.operations import (
    EVENTS,
    JSON,
    AppState,
    Operation,
    Prepared,
    generate,
    line,
)
from mlx_onevision.plugins.hosts.http.schemas import (
    LOGPROBS,
    CallItem,
    Item,
    ReferenceItem,
    ResponsesRequest,
    ResultItem,
    UserItem,
    options,
)
from mlx_onevision.plugins.hosts.http.tools import NOT_CHOSEN, CallText, ForcedCall, forced_call
from mlx_onevision.plugins.hosts.http.truncation import generate_shortened


async def respond(state: AppState, request: Request) -> Response:
    """Answers a response, whole or as server-sent events."""
    prepared = await state.reader.read(request, ResponsesRequest, partial(_prepare, state))
    return await generate(state, request, prepared)


def _prepare(state: AppState, asked: ResponsesRequest) -> Prepared:
    state.check_model(asked.model)
    logprobs = LOGPROBS in (asked.include or ())
    notes: list[str] = []
    said = Conversation(asked, state.memory)
    call = forced_call(asked.tools or (), asked.tool_choice, said.called)
    if asked.tools and call is None and asked.tool_choice != "none":
        notes.append(NOT_CHOSEN)
    form = asked.text.format if asked.text else None
    wanted = GenerateRequest(
        messages=said.with_instructions(asked.instructions),
        max_tokens=state.max_tokens(asked.max_output_tokens, "max_output_tokens", notes),
        logprobs=(asked.top_logprobs or 0) if logprobs or asked.top_logprobs else None,
        json_schema=call.schema if call else schema_text(form, asked),
        **options(asked),
    )
    keep = None if asked.store is False else said.keep
    shortens = asked.truncation == "auto"
    return Prepared(
        requests=[wanted],
        answer=Answer(asked, state.model, notes, call, keep),
        streamed=bool(asked.stream),
        logprobs="include" if asked.top_logprobs is None else "top_logprobs",
        json_schema="tool_choice" if call else "text",
        start=partial(generate_shortened, state.backend, notes=notes) if shortens else None,
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
        self._memory.keep(Kept(body, messages, self._names, frozenset(self.called)))


class Answer:
    """A response, at any point of its making. It has one item: a message with one text, or a call.

    notes : of the request. call : what the answer has to be, if not text. keep : called with the
        whole response, unless it is not to be kept.
    """

    def __init__(
        self,
        asked: ResponsesRequest,
        model: str,
        notes: Sequence[str] = (),
        call: ForcedCall | None = None,
        keep: Callable[[types.ResponseObject], None] | None = None,
    ) -> None:
        self._keep = keep
        self._asked, self._model, self._notes = asked, model, notes
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._call = CallText(call) if call else None
        self._item_id = f"{'msg' if call is None else 'fc'}_{uuid.uuid4().hex}"
        self._text, self._numbers = "", count()  # of a call, its arguments
        self._announced = self._begun = False

    def _body(self) -> types.ResponseObject:
        asked = self._asked
        form: dict[str, Any] = {"type": "text"}
        if asked.text is not None and asked.text.format is not None:
            form = asked.text.format.model_dump(by_alias=True, exclude_none=True)
        choice = asked.tool_choice or ("auto" if asked.tools else "none")
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": [],
            "background": False,
            "parallel_tool_calls": False,
            "previous_response_id": asked.previous_response_id,
            "store": self._keep is not None,
            "temperature": asked.temperature,
            "text": {"format": form},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None,
        }

    def whole(self, found: Sequence[results.GenerateResult]) -> types.ResponseObject:
        (one,) = found
        if self._call is not None:
            self._text += self._call.add(one.text)
        return self._completed(one)

    def _completed(self, found: results.GenerateResult) -> types.ResponseObject:
        body, cut = self._body(), found.finish_reason == "length"
        status: types.MessageStatus = "incomplete" if cut else "completed"
        if self._call is not None:
            body["output"] = [self._called(status)]
        else:
            body["output"] = [self._said(status, _part(found.text, found.logprobs or ()))]
        body["usage"] = _usage(found.usage)
        body["status"] = status
        if cut:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["completed_at"] = int(time.time())
        if notes := [*self._notes, *found.notes]:
            body["notes"] = notes
        if self._keep is not None:
            self._keep(body)
        return body

    def _failed(self, error: PluginError) -> types.ResponseObject:
        body, found = self._body(), to_http_error(error)
        code = "server_error" if found.status >= 500 else "invalid_prompt"
        body["status"], body["error"] = "failed", {"code": code, "message": found.message}
        if self._begun:
            item = self._said("incomplete", _part(self._text))
            body["output"] = [item if self._call is None else self._called("incomplete")]
        return body

    def _said(self, status: types.MessageStatus, *content: types.OutputText) -> types.OutputMessage:
        return {
            "type": "message",
            "id": self._item_id,
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    def _called(self, status: types.MessageStatus) -> types.FunctionCall:
        assert self._call is not None
        return {
            "type": "function_call",
            "id": self._item_id,
            "call_id": self._call.id,
            "name": self._call.name or "",
            "arguments": self._text,
            "status": status,
        }

    def events(self, event: results.Event, index: int = 0) -> Iterator[bytes]:
        for made in self._made(event):
            yield line(made, made["type"])

    def _made(self, event: results.Event) -> Iterator[types.ResponseEvent]:
        if not self._announced and not isinstance(event, results.ProgressEvent):
            # No earlier: until something is sent, an error has a status of its own.
            self._announced = True
            yield self._state("response.created", self._body())
            yield self._state("response.in_progress", self._body())
        if isinstance(event, results.TextEvent):
            yield from self._delta(event)
        elif isinstance(event, results.DoneEvent):
            assert isinstance(event.result, results.GenerateResult)
            yield from self._begin()
            yield from self._end(event.result)
        elif isinstance(event, results.ErrorEvent):
            yield self._state("response.failed", self._failed(event.error))

    def _delta(self, event: results.TextEvent) -> Iterator[types.ResponseEvent]:
        if self._call is None:
            yield from self._begin()
            self._text += event.delta
            yield {
                "type": "response.output_text.delta",
                **self._in_item(),
                "delta": event.delta,
                "logprobs": [types.chosen(token) for token in event.logprobs],
            }
        elif arguments := self._call.add(event.delta):
            yield from self._begin()
            self._text += arguments
            kind = "response.function_call_arguments.delta"
            yield {"type": kind, **self._of_item(), "delta": arguments}

    def _begin(self) -> Iterator[types.ResponseEvent]:
        if self._begun:
            return
        self._begun = True
        if self._call is not None:
            yield self._item_event("response.output_item.added", self._called("in_progress"))
            return
        yield self._item_event("response.output_item.added", self._said("in_progress"))
        yield {"type": "response.content_part.added", **self._in_item(), "part": _part("")}

    def _end(self, found: results.GenerateResult) -> Iterator[types.ResponseEvent]:
        body = self._completed(found)
        (item,) = body["output"]
        if item["type"] == "function_call":
            yield {
                "type": "response.function_call_arguments.done",
                **self._of_item(),
                "name": item["name"],
                "arguments": item["arguments"],
            }
        else:
            (part,) = item["content"]
            yield {
                "type": "response.output_text.done",
                **self._in_item(),
                "text": part["text"],
                "logprobs": part["logprobs"],
            }
            yield {"type": "response.content_part.done", **self._in_item(), "part": part}
        yield self._item_event("response.output_item.done", item)
        cut = body["status"] == "incomplete"
        yield self._state("response.incomplete" if cut else "response.completed", body)

    def _of_item(self) -> types.OfItem:
        """The number of an event within the item, and where that is."""
        return {"sequence_number": next(self._numbers), "item_id": self._item_id, "output_index": 0}

    def _in_item(self) -> types.InItem:
        return {**self._of_item(), "content_index": 0}

    def _item_event(
        self,
        kind: Literal["response.output_item.added", "response.output_item.done"],
        item: types.OutputItem,
    ) -> types.ItemEvent:
        number = next(self._numbers)
        return {"type": kind, "sequence_number": number, "output_index": 0, "item": item}

    def _state(self, kind: types.WholeType, body: types.ResponseObject) -> types.ResponseEvent:
        return {"type": kind, "sequence_number": next(self._numbers), "response": body}


def _part(text: str, logprobs: Sequence[results.TokenLogprob] = ()) -> types.OutputText:
    tokens = [types.chosen(token) for token in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _usage(usage: results.Usage) -> types.ResponseUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "media_tokens": usage.media_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "seconds": types.Took(**usage.seconds),
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


async def retrieve(state: AppState, request: Request) -> Response:
    """Answers with a response that is kept."""
    return JSONResponse(state.memory.response(request.path_params["id"]).body)


async def delete(state: AppState, request: Request) -> Response:
    """Forgets a response, and answers that it did."""
    id = request.path_params["id"]
    state.memory.forget(id)
    deleted: types.Deleted = {"id": id, "object": "response", "deleted": True}
    return JSONResponse(deleted)


PATH = "/v1/responses"

OPERATIONS = (
    Operation(
        "POST",
        PATH,
        respond,
        name="createResponse",
        summary="The next answer of a conversation",
        takes=ResponsesRequest,
        gives={JSON: types.ResponseObject, EVENTS: types.ResponseEvent},
    ),
    Operation(
        "GET",
        PATH + "/{id}",
        retrieve,
        name="retrieveResponse",
        summary="A response that is kept",
        gives={JSON: types.ResponseObject},
        refuses=(404,),
    ),
    Operation(
        "DELETE",
        PATH + "/{id}",
        delete,
        name="deleteResponse",
        summary="Forget a response",
        gives={JSON: types.Deleted},
        refuses=(404,),
    ),
)
