"""``POST /v1/chat/completions``."""

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.contract import results
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.hosts.http import response_types as types
from mlx_onevision.plugins.hosts.http.content import called_since_asked, conversation
from mlx_onevision.plugins.hosts.http.errors import ErrorBody, to_http_error
from mlx_onevision.plugins.hosts.http.formats import schema_text
from mlx_onevision.plugins.hosts.http.operations import (
    EVENTS,
    JSON,
    LAST_CHUNK,
    AppState,
    Operation,
    Prepared,
    generate,
    line,
)
from mlx_onevision.plugins.hosts.http.schemas import ChatRequest, options
from mlx_onevision.plugins.hosts.http.tools import (
    TOOLS_IGNORED_NOTE,
    CallText,
    ForcedCall,
    forced_call,
)


async def chat(state: AppState, request: Request) -> Response:
    """Answers a chat completion, whole or as server-sent events."""
    prepared = await state.reader.read(request, ChatRequest, partial(_prepare, state))
    return await generate(state, request, prepared)


def _prepare(state: AppState, asked: ChatRequest) -> Prepared:
    state.check_model(asked.model)
    notes: list[str] = []
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    functions = [tool.function for tool in asked.tools or ()]
    call = forced_call(functions, asked.tool_choice, called_since_asked(asked.messages))
    if functions and call is None and asked.tool_choice != "none":
        notes.append(TOOLS_IGNORED_NOTE)
    wanted = GenerateRequest(
        messages=conversation(asked.messages),
        max_tokens=state.max_tokens(getattr(asked, name), name, notes),
        stop=tuple(asked.stop or ()),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        json_schema=call.schema if call else schema_text(asked.response_format, asked),
        **options(asked),
    )
    seeds = [
        None if wanted.seed is None else (wanted.seed + place) % 2**64
        for place in range(asked.n or 1)
    ]
    usage = asked.stream_options is not None and asked.stream_options.include_usage
    return Prepared(
        requests=[replace(wanted, seed=seed) for seed in seeds],
        answer=Answer(state.model, usage, notes, call, len(seeds)),
        streamed=bool(asked.stream),
        logprobs="logprobs",
        json_schema="tool_choice" if call else "response_format",
    )


class Answer:
    """A completion of some choices, whole or in chunks, the last of which holds the usage if that
    is wanted.

    notes : of the request. call : what the answer has to be, if not text.
    """

    def __init__(
        self,
        model: str,
        usage: bool,
        notes: Sequence[str] = (),
        call: ForcedCall | None = None,
        choices: int = 1,
    ) -> None:
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._model, self._usage, self._notes, self._call = model, usage, tuple(notes), call
        self._begun: set[int] = set()
        self._named: set[int] = set()  # choices whose function was named
        self._called = [CallText(call) if call else None for _ in range(choices)]
        self._done: dict[int, results.GenerateResult] = {}

    def whole(self, found: Sequence[results.GenerateResult]) -> types.ChatCompletion:
        body: types.ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(one, index) for index, one in enumerate(found)],
            "usage": types.usage_body(types.sum_usage([one.usage for one in found])),
        }
        if notes := self._all_notes(found):
            body["notes"] = notes
        return body

    def _choice(self, found: results.GenerateResult, index: int) -> types.Choice:
        message: types.AssistantMessage = {
            "role": "assistant",
            "content": found.text,
            "refusal": None,
        }
        call = self._called[index]
        if call is not None:
            arguments = call.add(found.text)
            function: types.CalledFunction = {"name": call.name or "", "arguments": arguments}
            message["content"] = None
            message["tool_calls"] = [{"id": call.id, "type": "function", "function": function}]
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(found.logprobs),
            "finish_reason": self._finish(found),
        }

    def _finish(self, found: results.GenerateResult) -> types.Finish:
        called = self._call is not None and found.finish_reason == "stop"
        return "tool_calls" if called else found.finish_reason

    def _all_notes(self, found: Iterable[results.GenerateResult]) -> list[str]:
        return list(dict.fromkeys((*self._notes, *(note for one in found for note in one.notes))))

    def events(self, event: results.Event, index: int) -> Iterator[bytes]:
        if isinstance(event, results.TextEvent):
            yield from self._begin(index)
            yield self._line(self._chunk(index, self._delta(index, event.delta), event.logprobs))
        elif isinstance(event, results.DoneEvent):
            assert isinstance(event.result, results.GenerateResult)
            yield from self._begin(index)
            self._done[index] = event.result
            last = self._chunk(index, {}, finish=self._finish(event.result))
            over = len(self._done) == len(self._called)
            if over and (notes := self._all_notes(self._done.values())):
                last["notes"] = notes
            yield self._line(last)
            if over:
                yield from self._end()
        elif isinstance(event, results.ErrorEvent):
            yield line(to_http_error(event.error).body)

    def _delta(self, index: int, text: str) -> types.Delta:
        call = self._called[index]
        if call is None:
            return {"content": text}
        arguments = call.add(text)
        if call.name is None:
            return {}
        if index in self._named:
            return {"tool_calls": [{"index": 0, "function": {"arguments": arguments}}]}
        self._named.add(index)
        function: types.CalledFunctionDelta = {"name": call.name, "arguments": arguments}
        first: types.ToolCallDelta = {"index": 0, "id": call.id, "function": function}
        return {"tool_calls": [{**first, "type": "function"}]}

    def _begin(self, index: int) -> Iterator[bytes]:
        if index in self._begun:
            return
        self._begun.add(index)
        text = "" if self._called[index] is None else None
        yield self._line(self._chunk(index, {"role": "assistant", "content": text}))

    def _end(self) -> Iterator[bytes]:
        if self._usage:
            usage = types.sum_usage([one.usage for one in self._done.values()])
            yield line({**self._chunk(0, {}), "choices": [], "usage": types.usage_body(usage)})
        yield line(LAST_CHUNK)

    def _line(self, chunk: types.ChatCompletionChunk) -> bytes:
        """Every chunk has the usage when it was asked for; but for the last it is empty."""
        if self._usage:
            chunk["usage"] = None
        return line(chunk)

    def _chunk(
        self,
        index: int,
        delta: types.Delta,
        logprobs: Sequence[results.TokenLogprob] = (),
        finish: types.Finish | None = None,
    ) -> types.ChatCompletionChunk:
        choice: types.ChunkChoice = {
            "index": index,
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
    return {"content": [types.token_logprob(token) for token in tokens], "refusal": None}


OPERATION = Operation(
    "POST",
    "/v1/chat/completions",
    chat,
    name="createChatCompletion",
    summary="The next message of a conversation",
    takes=ChatRequest,
    gives={JSON: types.ChatCompletion, EVENTS: types.ChatCompletionChunk | ErrorBody},
    ends=LAST_CHUNK,
)
