"""``POST /v1/chat/completions``."""

import time
import uuid
from collections.abc import Iterator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.results import (
    DoneEvent,
    ErrorEvent,
    Event,
    FinishReason,
    GenerateResult,
    TextEvent,
    TokenLogprob,
    Usage,
)
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http import streaming
from mlx_onevision.plugins.hosts.http.errors import ErrorBody, error_body
from mlx_onevision.plugins.hosts.http.operations import (
    DONE,
    EVENTS,
    JSON,
    Endpoint,
    Operation,
    Serving,
    check_able,
)
from mlx_onevision.plugins.hosts.http.response_types import (
    ChatCompletion,
    ChatCompletionChunk,
    ChoiceLogprobs,
    Delta,
    chosen,
    usage_body,
)
from mlx_onevision.plugins.hosts.http.schemas import ChatRequest


def endpoint(serving: Serving) -> Endpoint:
    async def chat(request: Request) -> Response:
        asked = await serving.reader.read(request, ChatRequest)
        conversation.check_model(asked.model, serving.model)
        wanted = conversation.question(asked, serving.settings.unsaid)
        await check_able(serving, wanted, logprobs="logprobs", json_schema="response_format")
        answer = Answer(serving.model)
        stream = serving.backend.generate(wanted)
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
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._model = model

    def whole(self, found: GenerateResult) -> ChatCompletion:
        body: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": found.text, "refusal": None},
                    "logprobs": _logprobs(found.logprobs),
                    "finish_reason": found.finish_reason,
                }
            ],
            "usage": usage_body(found.usage),
        }
        if found.notes:
            body["notes"] = list(found.notes)
        return body

    def chunk(
        self,
        delta: Delta,
        logprobs: Sequence[TokenLogprob] = (),
        finish: FinishReason | None = None,
    ) -> ChatCompletionChunk:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [
                {
                    "index": 0,
                    "delta": delta,
                    "logprobs": _logprobs(logprobs or None),
                    "finish_reason": finish,
                }
            ],
        }

    def last(self, found: GenerateResult) -> ChatCompletionChunk:
        chunk = self.chunk({}, finish=found.finish_reason)
        if found.notes:
            chunk["notes"] = list(found.notes)
        return chunk

    def usage(self, usage: Usage) -> ChatCompletionChunk:
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
            yield self._line(self._answer.chunk({"content": event.delta}, event.logprobs))
        elif isinstance(event, DoneEvent):
            assert isinstance(event.result, GenerateResult)
            self._serving.metrics.usage(event.result.usage)
            yield from self._begin()
            yield self._line(self._answer.last(event.result))
            if self._usage:
                yield streaming.line(self._answer.usage(event.result.usage))
            yield streaming.line(DONE)
        elif isinstance(event, ErrorEvent):
            yield streaming.line(error_body(event.error))

    def _begin(self) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            yield self._line(self._answer.chunk({"role": "assistant", "content": ""}))

    def _line(self, chunk: ChatCompletionChunk) -> bytes:
        """Every chunk has the usage when it was asked for; but for the last it is empty."""
        if self._usage:
            chunk["usage"] = None
        return streaming.line(chunk)


def _logprobs(tokens: Sequence[TokenLogprob] | None) -> ChoiceLogprobs | None:
    if tokens is None:
        return None
    return {"content": [chosen(token) for token in tokens], "refusal": None}


OPERATION = Operation(
    "POST",
    "/v1/chat/completions",
    endpoint,
    name="createChatCompletion",
    summary="The next message of a conversation",
    takes=ChatRequest,
    gives={JSON: ChatCompletion, EVENTS: ChatCompletionChunk | ErrorBody},
    ends=DONE,
)
