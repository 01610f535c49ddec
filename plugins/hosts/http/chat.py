"""``POST /v1/chat/completions``."""

import time
import uuid
from collections.abc import Iterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.hosts.http import response_types as types
from mlx_onevision.plugins.hosts.http.content import schema_text
from mlx_onevision.plugins.hosts.http.errors import ErrorBody, to_http_error
from mlx_onevision.plugins.hosts.http.operations import (
    DONE,
    EVENTS,
    JSON,
    AppState,
    Operation,
    generate,
    line,
)
from mlx_onevision.plugins.hosts.http.schemas import ChatRequest, MediaOptions


async def chat(state: AppState, request: Request) -> Response:
    asked = await state.reader.read(request, ChatRequest)
    state.check_model(asked.model)
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    wanted = GenerateRequest(
        messages=[turn.to_contract() for turn in asked.messages],
        max_tokens=most,
        stop=tuple(asked.stop or ()),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        json_schema=schema_text(asked.response_format),
        **{name: getattr(asked, name) for name in MediaOptions.model_fields},
    )
    await state.check_capabilities(wanted, logprobs="logprobs", json_schema="response_format")
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    answer = Answer(state.model, usage)
    return await generate(state, request, wanted, answer, bool(asked.stream))


class Answer:
    """One completion, whole or in chunks, the last of which holds the usage if that is wanted."""

    def __init__(self, model: str, usage: bool) -> None:
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._model, self._usage, self._begun = model, usage, False

    def whole(self, found: results.GenerateResult) -> types.ChatCompletion:
        body: types.ChatCompletion = {
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
            "usage": types.usage_body(found.usage),
        }
        if found.notes:
            body["notes"] = list(found.notes)
        return body

    def events(self, event: results.Event) -> Iterator[bytes]:
        if isinstance(event, results.TextEvent):
            yield from self._begin()
            yield self._line(self._chunk({"content": event.delta}, event.logprobs))
        elif isinstance(event, results.DoneEvent):
            assert isinstance(event.result, results.GenerateResult)
            yield from self._begin()
            last = self._chunk({}, finish=event.result.finish_reason)
            if event.result.notes:
                last["notes"] = list(event.result.notes)
            yield self._line(last)
            if self._usage:
                usage = types.usage_body(event.result.usage)
                yield line({**self._chunk({}), "choices": [], "usage": usage})
            yield line(DONE)
        elif isinstance(event, results.ErrorEvent):
            yield line(to_http_error(event.error).body)

    def _begin(self) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            yield self._line(self._chunk({"role": "assistant", "content": ""}))

    def _line(self, chunk: types.ChatCompletionChunk) -> bytes:
        """Every chunk has the usage when it was asked for; but for the last it is empty."""
        if self._usage:
            chunk["usage"] = None
        return line(chunk)

    def _chunk(
        self,
        delta: types.Delta,
        logprobs: Sequence[results.TokenLogprob] = (),
        finish: results.FinishReason | None = None,
    ) -> types.ChatCompletionChunk:
        choice: types.ChunkChoice = {
            "index": 0,
            "delta": delta,
            "logprobs": _logprobs(logprobs or None),
            "finish_reason": finish,
        }
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [choice],
        }


def _logprobs(tokens: Sequence[results.TokenLogprob] | None) -> types.ChoiceLogprobs | None:
    if tokens is None:
        return None
    return {"content": [types.chosen(token) for token in tokens], "refusal": None}


OPERATION = Operation(
    "POST",
    "/v1/chat/completions",
    chat,
    name="createChatCompletion",
    summary="The next message of a conversation",
    takes=ChatRequest,
    gives={JSON: types.ChatCompletion, EVENTS: types.ChatCompletionChunk | ErrorBody},
    ends=DONE,
)
