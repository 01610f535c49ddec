"""``POST /v1/responses``, without a memory: what was said before comes with every request."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import (
    DoneEvent,
    ErrorEvent,
    Event,
    GenerateResult,
    ProgressEvent,
    TextEvent,
    TokenLogprob,
    Usage,
)
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http import streaming
from mlx_onevision.plugins.hosts.http.errors import as_fault
from mlx_onevision.plugins.hosts.http.operations import (
    EVENTS,
    JSON,
    Endpoint,
    Operation,
    Serving,
    check_able,
)
from mlx_onevision.plugins.hosts.http.response_types import (
    InItem,
    MessageStatus,
    OutputMessage,
    OutputText,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
    WholeType,
    chosen,
    took,
)
from mlx_onevision.plugins.hosts.http.schemas import ResponsesRequest

# A response, at any point of its making, as ``/v1/responses`` says it.


class Answer:
    """A response, at any point of its making. It has one message with one text."""

    def __init__(self, asked: ResponsesRequest, model: str) -> None:
        self._asked, self._model = asked, model
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.item_id = f"msg_{uuid.uuid4().hex}"

    def begun(self) -> ResponseObject:
        """Before there is anything of it."""
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

    def done(self, found: GenerateResult) -> ResponseObject:
        body = self.begun()
        body["output"] = [self.message(found)]
        body["usage"] = _usage(found.usage)
        if found.finish_reason == "length":
            body["status"] = "incomplete"
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            body["status"] = "completed"
            body["completed_at"] = int(time.time())
        if found.notes:
            body["notes"] = list(found.notes)
        return body

    def failed(self, error: PluginError, said: str | None) -> ResponseObject:
        """said : what there was of the text; None before it began."""
        body = self.begun()
        fault = as_fault(error)
        code = "server_error" if fault.status >= 500 else "invalid_prompt"
        body["status"], body["error"] = "failed", {"code": code, "message": fault.message}
        if said is not None:
            body["output"] = [self.item("incomplete", [text_part(said)])]
        return body

    def message(self, found: GenerateResult) -> OutputMessage:
        part = text_part(found.text, found.logprobs or ())
        return self.item("incomplete" if found.finish_reason == "length" else "completed", [part])

    def item(self, status: MessageStatus, content: list[OutputText]) -> OutputMessage:
        return {
            "type": "message",
            "id": self.item_id,
            "role": "assistant",
            "status": status,
            "content": content,
        }


def text_part(text: str, logprobs: Sequence[TokenLogprob] = ()) -> OutputText:
    tokens = [chosen(token) for token in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _usage(usage: Usage) -> ResponseUsage:
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
        "seconds": took(usage),
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


def endpoint(serving: Serving) -> Endpoint:
    async def respond(request: Request) -> Response:
        asked = await serving.reader.read(request, ResponsesRequest)
        conversation.check_model(asked.model, serving.model)
        wanted = conversation.response_question(asked, serving.settings.unsaid)
        named = "include" if asked.top_logprobs is None else "top_logprobs"
        await check_able(serving, wanted, logprobs=named, json_schema="text")
        answer = Answer(asked, serving.model)
        stream = serving.backend.generate(wanted)
        if asked.stream:
            events = Events(answer, serving)
            return streaming.SentEvents(stream, events.of, serving.settings.silence)
        found = await streaming.result(stream, request.receive)
        serving.metrics.usage(found.usage)
        return JSONResponse(answer.done(found))

    return respond


class Events:
    """The contract's events as those of a response's stream."""

    def __init__(self, answer: Answer, serving: Serving) -> None:
        self._answer, self._serving = answer, serving
        self._number = -1
        self._said = ""
        self._created = self._begun = False
        self._item: InItem = {"item_id": answer.item_id, "output_index": 0, "content_index": 0}

    def of(self, event: Event) -> Iterator[bytes]:
        """What is sent for an event; for most, nothing."""
        for made in self._made(event):
            yield streaming.line(made, made["type"])

    def _made(self, event: Event) -> Iterator[ResponseEvent]:
        if not self._created and not isinstance(event, ProgressEvent):
            # No earlier: until something is sent, an error has a status of its own.
            self._created = True
            yield self._whole("response.created", self._answer.begun())
            yield self._whole("response.in_progress", self._answer.begun())
        if isinstance(event, TextEvent):
            yield from self._begin()
            self._said += event.delta
            yield {
                "type": "response.output_text.delta",
                "sequence_number": self._next(),
                **self._item,
                "delta": event.delta,
                "logprobs": [chosen(token) for token in event.logprobs],
            }
        elif isinstance(event, DoneEvent):
            assert isinstance(event.result, GenerateResult)
            self._serving.metrics.usage(event.result.usage)
            yield from self._begin()
            yield from self._end(event.result)
        elif isinstance(event, ErrorEvent):
            said = self._said if self._begun else None
            yield self._whole("response.failed", self._answer.failed(event.error, said))

    def _begin(self) -> Iterator[ResponseEvent]:
        if self._begun:
            return
        self._begun = True
        yield {
            "type": "response.output_item.added",
            "sequence_number": self._next(),
            "output_index": 0,
            "item": self._answer.item("in_progress", []),
        }
        yield {
            "type": "response.content_part.added",
            "sequence_number": self._next(),
            **self._item,
            "part": text_part(""),
        }

    def _end(self, found: GenerateResult) -> Iterator[ResponseEvent]:
        body = self._answer.done(found)
        (message,) = body["output"]
        (part,) = message["content"]
        yield {
            "type": "response.output_text.done",
            "sequence_number": self._next(),
            **self._item,
            "text": part["text"],
            "logprobs": part["logprobs"],
        }
        yield {
            "type": "response.content_part.done",
            "sequence_number": self._next(),
            **self._item,
            "part": part,
        }
        yield {
            "type": "response.output_item.done",
            "sequence_number": self._next(),
            "output_index": 0,
            "item": message,
        }
        cut = found.finish_reason == "length"
        yield self._whole("response.incomplete" if cut else "response.completed", body)

    def _whole(self, kind: WholeType, body: ResponseObject) -> ResponseEvent:
        return {"type": kind, "sequence_number": self._next(), "response": body}

    def _next(self) -> int:
        self._number += 1
        return self._number


OPERATION = Operation(
    "POST",
    "/v1/responses",
    endpoint,
    name="createResponse",
    summary="An answer to everything that was said; nothing of it is kept",
    takes=ResponsesRequest,
    gives={JSON: ResponseObject, EVENTS: ResponseEvent},
)
