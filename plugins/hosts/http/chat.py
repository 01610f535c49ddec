"""``POST /v1/chat/completions``."""

import time
import uuid
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.events import DoneEvent, ErrorEvent, Event, TextEvent
from mlx_onevision.plugins.hosts.http import conversation, streaming
from mlx_onevision.plugins.hosts.http.faults import error_body
from mlx_onevision.plugins.hosts.http.operations import EVENTS, JSON, Operation
from mlx_onevision.plugins.hosts.http.schemas import ChatRequest
from mlx_onevision.plugins.hosts.http.serving import Endpoint, Serving
from mlx_onevision.plugins.results import GenerateResult, Usage


def endpoint(serving: Serving) -> Endpoint:
    async def chat(request: Request) -> Response:
        asked = await serving.reader.read(request, ChatRequest)
        conversation.check_model(asked.model, serving.model)
        answer = Answer(serving.model)
        stream = serving.backend.generate(conversation.question(asked))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            chunks = Chunks(answer, serving, usage)
            return streaming.SentEvents(stream, chunks.of, serving.settings.silence)
        found = await streaming.result(stream, request.receive)
        serving.metrics.usage(found.usage)
        return JSONResponse(answer.whole(found))

    return chat


class Answer:
    """What all parts of an answer have in common."""

    def __init__(self, model: str) -> None:
        self._same = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, found: GenerateResult) -> dict[str, Any]:
        message = {"role": "assistant", "content": found.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": found.finish_reason,
        }
        return {
            **self._same,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_body(found.usage),
            **_notes(found),
        }

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._same, "object": "chat.completion.chunk", "choices": [choice]}

    def last(self, found: GenerateResult) -> dict[str, Any]:
        return {**self.chunk({}, found.finish_reason), **_notes(found)}

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self.chunk({}), "choices": [], "usage": usage_body(usage)}


class Chunks:
    """Events as the chunks of an answer."""

    def __init__(self, answer: Answer, serving: Serving, usage: bool) -> None:
        self._answer, self._serving, self._usage = answer, serving, usage
        self._begun = False

    def of(self, event: Event) -> Iterator[bytes]:
        """What is sent for an event; for most, nothing."""
        if isinstance(event, TextEvent):
            yield from self._begin()
            yield streaming.line(self._with_usage(self._answer.chunk({"content": event.delta})))
        elif isinstance(event, DoneEvent):
            assert isinstance(event.result, GenerateResult)
            self._serving.metrics.usage(event.result.usage)
            yield from self._begin()
            yield streaming.line(self._with_usage(self._answer.last(event.result)))
            if self._usage:
                yield streaming.line(self._answer.usage(event.result.usage))
            yield streaming.line("[DONE]")
        elif isinstance(event, ErrorEvent):
            yield streaming.line(error_body(event.error))

    def _begin(self) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            first = self._answer.chunk({"role": "assistant", "content": ""})
            yield streaming.line(self._with_usage(first))

    def _with_usage(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Every chunk has the field when it was asked for; but for the last it is empty."""
        return {**chunk, "usage": None} if self._usage else chunk


def usage_body(usage: Usage) -> dict[str, Any]:
    """Tokens, as OpenAI counts them; seconds and bytes beside them."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "media_tokens": usage.media_tokens,
        },
        "seconds": {
            "prepare": usage.prepare_seconds,
            "encode": usage.encode_seconds,
            "prefill": usage.prefill_seconds,
            "decode": usage.decode_seconds,
        },
        "peak_memory_bytes": usage.peak_memory_bytes,
    }


def _notes(found: GenerateResult) -> dict[str, Any]:
    return {"notes": list(found.notes)} if found.notes else {}


OPERATION = Operation(
    "POST",
    "/v1/chat/completions",
    endpoint,
    name="createChatCompletion",
    summary="The next message of a conversation",
    takes=ChatRequest,
    gives={JSON: dict[str, Any], EVENTS: dict[str, Any]},
)
