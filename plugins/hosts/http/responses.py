"""``POST /v1/responses``, without a memory: what was said before comes with every request."""

from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.events import (
    DoneEvent,
    ErrorEvent,
    Event,
    ProgressEvent,
    TextEvent,
)
from mlx_onevision.plugins.contract.results import GenerateResult
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http import streaming
from mlx_onevision.plugins.hosts.http.abilities import check_able
from mlx_onevision.plugins.hosts.http.operations import EVENTS, JSON, Operation
from mlx_onevision.plugins.hosts.http.response_answer import Answer, text_part
from mlx_onevision.plugins.hosts.http.response_objects import (
    InItem,
    ResponseEvent,
    ResponseObject,
    WholeType,
)
from mlx_onevision.plugins.hosts.http.response_types import chosen
from mlx_onevision.plugins.hosts.http.schemas import ResponsesRequest
from mlx_onevision.plugins.hosts.http.serving import Endpoint, Serving


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
