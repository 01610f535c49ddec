"""``POST /v1/responses``, without a memory: the whole conversation comes with every request."""

import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import GenerateRequest, Message
from mlx_onevision.plugins.hosts.http import response_types as types
from mlx_onevision.plugins.hosts.http.content import schema_text
from mlx_onevision.plugins.hosts.http.errors import to_http_error
from mlx_onevision.plugins.hosts.http.operations import (
    EVENTS,
    JSON,
    AppState,
    Operation,
    generate,
    line,
)
from mlx_onevision.plugins.hosts.http.schemas import LOGPROBS, MediaOptions, ResponsesRequest


async def respond(state: AppState, request: Request) -> Response:
    asked = await state.reader.read(request, ResponsesRequest)
    state.check_model(asked.model)
    logprobs = LOGPROBS in (asked.include or ())
    wanted = GenerateRequest(
        messages=_messages(asked),
        max_tokens=asked.max_output_tokens,
        logprobs=(asked.top_logprobs or 0) if logprobs or asked.top_logprobs else None,
        json_schema=schema_text(asked.text.format if asked.text else None),
        **{name: getattr(asked, name) for name in MediaOptions.model_fields},
    )
    named = "include" if asked.top_logprobs is None else "top_logprobs"
    await state.check_capabilities(wanted, logprobs=named, json_schema="text")
    answer = Answer(asked, state.model)
    return await generate(state, request, wanted, answer, bool(asked.stream))


def _messages(asked: ResponsesRequest) -> list[Message]:
    """The model knows one system message: what there is besides instructions goes into it."""
    messages = [item.to_contract() for item in asked.input]
    if asked.instructions is not None:
        system = asked.instructions
        if messages[0].role == "system":
            parts = messages.pop(0).parts
            system = f"{system}\n\n{''.join(part for part in parts if isinstance(part, str))}"
        messages.insert(0, Message("system", system))
    return messages


class Answer:
    """A response, at any point of its making. It has one message with one text."""

    def __init__(self, asked: ResponsesRequest, model: str) -> None:
        self._asked, self._model = asked, model
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._text, self._numbers = "", count()
        self._announced = self._begun = False

    def _body(self) -> types.ResponseObject:
        asked = self._asked
        form: dict[str, Any] = {"type": "text"}
        if asked.text is not None and asked.text.format is not None:
            form = asked.text.format.model_dump(by_alias=True, exclude_none=True)
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
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": form},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, found: results.GenerateResult) -> types.ResponseObject:
        body, cut = self._body(), found.finish_reason == "length"
        part = _part(found.text, found.logprobs or ())
        body["output"] = [self._item("incomplete" if cut else "completed", part)]
        body["usage"] = _usage(found.usage)
        body["status"] = "incomplete" if cut else "completed"
        if cut:
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["completed_at"] = int(time.time())
        if found.notes:
            body["notes"] = list(found.notes)
        return body

    def _failed(self, error: PluginError) -> types.ResponseObject:
        body, found = self._body(), to_http_error(error)
        code = "server_error" if found.status >= 500 else "invalid_prompt"
        body["status"], body["error"] = "failed", {"code": code, "message": found.message}
        if self._begun:
            body["output"] = [self._item("incomplete", _part(self._text))]
        return body

    def _item(self, status: types.MessageStatus, *content: types.OutputText) -> types.OutputMessage:
        return {
            "type": "message",
            "id": self._item_id,
            "role": "assistant",
            "status": status,
            "content": list(content),
        }

    def events(self, event: results.Event) -> Iterator[bytes]:
        for made in self._made(event):
            yield line(made, made["type"])

    def _made(self, event: results.Event) -> Iterator[types.ResponseEvent]:
        if not self._announced and not isinstance(event, results.ProgressEvent):
            # No earlier: until something is sent, an error has a status of its own.
            self._announced = True
            yield self._state("response.created", self._body())
            yield self._state("response.in_progress", self._body())
        if isinstance(event, results.TextEvent):
            yield from self._begin()
            self._text += event.delta
            yield {
                "type": "response.output_text.delta",
                **self._next(),
                "delta": event.delta,
                "logprobs": [types.chosen(token) for token in event.logprobs],
            }
        elif isinstance(event, results.DoneEvent):
            assert isinstance(event.result, results.GenerateResult)
            yield from self._begin()
            yield from self._end(event.result)
        elif isinstance(event, results.ErrorEvent):
            yield self._state("response.failed", self._failed(event.error))

    def _begin(self) -> Iterator[types.ResponseEvent]:
        if self._begun:
            return
        self._begun = True
        yield self._item_event("response.output_item.added", self._item("in_progress"))
        yield {"type": "response.content_part.added", **self._next(), "part": _part("")}

    def _end(self, found: results.GenerateResult) -> Iterator[types.ResponseEvent]:
        body = self.whole(found)
        (message,) = body["output"]
        (part,) = message["content"]
        yield {
            "type": "response.output_text.done",
            **self._next(),
            "text": part["text"],
            "logprobs": part["logprobs"],
        }
        yield {"type": "response.content_part.done", **self._next(), "part": part}
        yield self._item_event("response.output_item.done", message)
        cut = body["status"] == "incomplete"
        yield self._state("response.incomplete" if cut else "response.completed", body)

    def _next(self) -> types.InItem:
        """The number of an event within the text, and where that is."""
        number, item = next(self._numbers), self._item_id
        return {"sequence_number": number, "item_id": item, "output_index": 0, "content_index": 0}

    def _item_event(
        self,
        kind: Literal["response.output_item.added", "response.output_item.done"],
        item: types.OutputMessage,
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


OPERATION = Operation(
    "POST",
    "/v1/responses",
    respond,
    name="createResponse",
    summary="An answer to a whole conversation; nothing of it is kept",
    takes=ResponsesRequest,
    gives={JSON: types.ResponseObject, EVENTS: types.ResponseEvent},
)
