"""A server of ``mlx-onevision serve`` as a backend; standard library only.

    with open_backend("http", url="http://127.0.0.1:8000") as backend:
        ...

What crosses over is what OpenAI's clients send and this server adds to it, over its public routes.
Pictures and videos are read here and go along as data.
"""

import base64
import json
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from mlx_onevision.plugins.adapters.http_call import Call, Server, error_of, strange
from mlx_onevision.plugins.contract.errors import (
    PluginError,
    bad_request,
    cancelled,
    to_plugin_error,
)
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Group,
    Media,
    Message,
)
from mlx_onevision.plugins.contract.results import (
    DescribeResult,
    DoneEvent,
    EmbedResult,
    ErrorEvent,
    Event,
    FinishReason,
    GenerateResult,
    ModelInfo,
    ProgressEvent,
    Result,
    TextEvent,
    TokenLogprob,
    TopLogprob,
    Usage,
    UsageEvent,
    event_from_dict,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# What a server answers, as the contract says it.

BROKEN = PluginError(
    "internal", "the answer broke off before its end", "the log of the server may say more"
)

_ITEM = re.compile(r"item (\d+): ")


class Answer:
    """The chunks of a chat completion, put together.

    logprobs : whether they were asked for.
    """

    def __init__(self, logprobs: bool) -> None:
        self._asked, self._begun = logprobs, False
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._notes: tuple[str, ...] = ()

    def add(self, data: str) -> Event | None:
        """The event that a chunk is, where it is one.

        Raises:
            PluginError: the error that a chunk tells of.
        """
        with _understood():
            chunk = json.loads(data)
            refused = error_of(chunk) if "error" in chunk else None
        if refused is not None:
            raise refused
        with _understood():
            if chunk.get("usage") is not None:
                self._usage = _usage(chunk["usage"])
            self._notes += tuple(chunk.get("notes", ()))
            for choice in chunk["choices"]:
                reason = choice.get("finish_reason")
                if reason is not None:
                    self._finish = "length" if reason == "length" else "stop"
                delta, told = choice["delta"].get("content") or "", _logprobs(choice)
                if delta or told:
                    self._text.append(delta)
                    self._logprobs += told
                    return TextEvent(delta, logprobs=told)
            if not self._begun:
                self._begun = True
                return ProgressEvent("answering")
        return None

    def whole(self) -> GenerateResult:
        """The answer. Raises PluginError when its end is missing."""
        if self._finish is None or self._usage is None:
            raise BROKEN
        told = tuple(self._logprobs) if self._asked else None
        return GenerateResult("".join(self._text), self._finish, self._usage, self._notes, told)


def event(data: str) -> Event:
    """An event of a described video. Raises PluginError."""
    with _understood():
        return event_from_dict(json.loads(data))


def vectors(body: Any) -> EmbedResult:
    """The vectors of a group of items. Raises PluginError."""
    with _understood():
        return EmbedResult(
            vectors=tuple(_vector(item["embedding"]) for item in body["data"]),
            space=body["space"],
            dim=body["dim"],
            model=body["model"],
            revision=body["revision"],
            method=body["method"],
            normalized=body["normalized"],
            quantization=body["quantization"],
        )


def renumbered(error: PluginError, before: int) -> PluginError:
    """The error, that names an item of a group, named by its number among all of them."""
    found = _ITEM.match(error.message)
    if found is None or not before:
        return error
    message = f"item {int(found[1]) + before}: {error.message[found.end() :]}"
    return PluginError(error.code, message, error.hint)


def model_info(body: Any) -> ModelInfo:
    """What a server says of its model. Raises PluginError."""
    with _understood():
        names = [field.name for field in fields(ModelInfo) if field.name in body]
        return ModelInfo.from_dict({name: body[name] for name in ("api_version", *names)})


@contextmanager
def _understood() -> Iterator[None]:
    """Whatever cannot be read is the server's fault, not the request's."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, struct.error, PluginError) as error:
        raise strange("what the server answers cannot be read") from error


def _usage(body: Mapping[str, Any]) -> Usage:
    details, seconds = body["prompt_tokens_details"], body["seconds"]
    return Usage(
        prompt_tokens=body["prompt_tokens"],
        cached_tokens=details["cached_tokens"],
        media_tokens=details["media_tokens"],
        completion_tokens=body["completion_tokens"],
        prepare_seconds=seconds["prepare"],
        encode_seconds=seconds["encode"],
        prefill_seconds=seconds["prefill"],
        decode_seconds=seconds["decode"],
        peak_memory_bytes=body["peak_memory_bytes"],
    )


def _logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...]:
    told = (choice.get("logprobs") or {}).get("content") or ()
    return tuple(
        TokenLogprob(*_token(one), top=tuple(TopLogprob(*_token(o)) for o in one["top_logprobs"]))
        for one in told
    )


def _token(values: Mapping[str, Any]) -> tuple[str, bytes, float]:
    return values["token"], bytes(values["bytes"]), values["logprob"]


def _vector(text: str) -> tuple[float, ...]:
    data = base64.b64decode(text, validate=True)
    return struct.unpack(f"<{len(data) // 4}f", data)


# The contract's requests, as OpenAI's clients would send them.

# What a server takes in one request of embeddings; more is sent in several.
ITEMS = 256
BYTES = 24 << 20

# Fields of a question that are sent under their own names; the server's are the contract's.
_ASKED = tuple(
    field.name
    for field in fields(GenerateRequest)
    if field.name not in ("messages", "system", "stop", "logprobs", "json_schema")
)
_DESCRIBED = tuple(field.name for field in fields(DescribeRequest) if field.name != "video")


def question(request: GenerateRequest, policy: MediaPolicy) -> dict[str, Any]:
    """The body of a chat completion that streams.

    Raises:
        PluginError: for a medium that the policy does not let be read.
    """
    system = [] if request.system is None else [Message("system", request.system)]
    body: dict[str, Any] = {
        "messages": [
            {"role": turn.role, "content": [_part(part, policy) for part in turn.parts]}
            for turn in (*system, *request.messages)
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        **_given(request, _ASKED),
    }
    if request.stop:
        body["stop"] = list(request.stop)
    if request.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.logprobs}
    if request.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": json.loads(request.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def description(request: DescribeRequest, policy: MediaPolicy) -> dict[str, Any]:
    """The body of a description. Raises PluginError."""
    # No longest segment is something else than nothing said of it.
    whole = {"longest": request.longest}
    return {"video": _place(request.video, policy), **_given(request, _DESCRIBED), **whole}


def items(request: EmbedRequest, policy: MediaPolicy) -> Iterator[list[dict[str, Any]]]:
    """The items, in groups that a server takes at once, no more than one of which is ever held.

    Raises:
        PluginError: for an item that the policy does not let be read, naming it.
    """
    group: list[dict[str, Any]] = []
    size = 0
    for number, item in enumerate(request.items, 1):
        try:
            part = _item(item, policy)
        except PluginError as error:
            raise error.of(f"item {number}") from None
        length = len(json.dumps(part))
        if group and (size + length > BYTES or len(group) == ITEMS):
            yield group
            group, size = [], 0
        group.append(part)
        size += length
    if group:
        yield group


def embedding(request: EmbedRequest, group: list[dict[str, Any]]) -> dict[str, Any]:
    """The body that asks for the vectors of a group."""
    return {
        "input": group,
        "encoding_format": "base64",
        **_given(request, ("space", "normalize", "tiling", "timeout")),
    }


def _given(request: Any, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(request, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _item(item: str | Media | Group, policy: MediaPolicy) -> dict[str, Any]:
    if isinstance(item, Group):
        return {"type": "group", "content": [_part(medium, policy) for medium in item.media]}
    return _part(item, policy)


def _part(part: str | Media, policy: MediaPolicy) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = f"{part.kind}_url"
    return {"type": kind, kind: _place(part, policy)}


def _place(medium: Media, policy: MediaPolicy) -> dict[str, str]:
    source = policy.open(medium)
    if not isinstance(source, bytes):
        with source:
            source = source.read(policy.size + 1)
        if source:  # a video is sent whole, so it is bounded as a picture is
            policy.admit([Media(medium.kind, data=source)])
    text = base64.b64encode(source).decode("ascii")
    return {"url": f"data:{medium.kind}/*;base64,{text}"}


MAKING_VECTORS = 3600.0  # seconds for which a server may say nothing, then; it has no other way
INFO_SECONDS = 30.0
PATIENCE_SECONDS = 5.0

CLOSED = bad_request("the backend has been closed", "open it again")

CHAT, EMBEDDINGS, DESCRIBE = "/v1/chat/completions", "/v1/embeddings", "/v1/video/describe"

Request = GenerateRequest | EmbedRequest | DescribeRequest
Calling = Callable[..., Call]
"""Makes a call that is cut off when its request ends."""


class HttpBackend:
    """A :class:`~mlx_onevision.plugins.interface.Backend`.

    url : the server's, with ``/v1`` or without.
    token : what the server asks for, where it does.
    model : refused by a server of another one; None takes the one that is there.
    policy : which files and addresses are read here, to be sent. By default none; what the server
        itself would read is never asked of it.
    timeout : seconds that a request may take; None leaves that to the request and to the server.
    """

    def __init__(
        self,
        *,
        url: str,
        token: str | None = None,
        model: str | None = None,
        policy: MediaPolicy | None = None,
        timeout: float | None = None,
    ) -> None:
        self.policy = policy or MediaPolicy()
        self._server, self._model, self._timeout = Server(url, token), model, timeout
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def info(self) -> ModelInfo:
        """What the server says. Raises PluginError, ``model_not_found`` where there is none."""
        route = "/v1/models"
        if self._model is not None:
            route += "/" + quote(self._model, safe="/")
        with Call(self._server, silence=INFO_SECONDS) as call:
            found = call.ask("GET", route)
        if self._model is None:
            listed = found.get("data") if isinstance(found, dict) else None
            found = listed[0] if isinstance(listed, list) and listed else None
        return model_info(found)

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        return self._start(request, GenerateRequest, self._generate)

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Raises PluginError."""
        with self.stream_embed(request) as stream:
            return stream.result()

    def stream_embed(self, request: EmbedRequest) -> EventStream[EmbedResult]:
        """The vectors are float32: what is sent is."""
        return self._start(request, EmbedRequest, self._embed)

    def describe_video(self, request: DescribeRequest) -> EventStream[DescribeResult]:
        return self._start(request, DescribeRequest, self._describe)

    def unload(self) -> None:
        """Nothing: the model belongs to whoever started the server, which has no route that frees
        it. Its ``--keep-alive`` does.
        """

    def close(self) -> None:
        """Cancels what is under way here. The server stays as it is."""
        with self._lock:
            self._closed = True
            channels, threads = tuple(self._channels), tuple(self._threads)
        for channel in channels:
            channel.fail(cancelled("the backend was closed"))
        for thread in threads:
            thread.join(PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(
        self,
        request: Any,
        kind: type[Request],
        work: Callable[[Any, Channel, Calling], Result],
    ) -> EventStream[Any]:
        channel = Channel()
        stream = channel.stream()
        thread = threading.Thread(
            target=self._run,
            args=(request, channel, work),
            name="mlx-onevision-asking",
            daemon=True,
        )
        try:
            if not isinstance(request, kind):
                named = f"a {type(request).__name__} came where a {kind.__name__} belongs"
                raise bad_request(named)
            self.policy.admit(request.media)
            with self._lock:
                if self._closed:
                    raise CLOSED
                self._channels.add(channel)
                self._threads.add(thread)
        except PluginError as error:
            channel.fail(error)
            return stream
        channel.limit(request.timeout, self._timeout)
        thread.start()
        return stream

    # On the request's thread.

    def _run(
        self,
        request: Any,
        channel: Channel,
        work: Callable[[Any, Channel, Calling], Result],
    ) -> None:
        def calling(**settings: Any) -> Call:
            call = Call(self._server, **settings)
            channel.at_end(call.cut)
            return call

        try:
            channel.put(ProgressEvent("queued"))
            result = work(request, channel, calling)
            usage = None if isinstance(result, EmbedResult) else result.usage
            if usage is not None:
                channel.put(UsageEvent(usage))
            channel.put(DoneEvent(result))
        except BaseException as error:
            channel.fail(cancelled() if channel.ended else to_plugin_error(error))
        finally:
            with self._lock:
                self._channels.discard(channel)
                self._threads.discard(threading.current_thread())

    def _generate(
        self, request: GenerateRequest, channel: Channel, calling: Calling
    ) -> GenerateResult:
        answer = Answer(request.logprobs is not None)
        body = self._named(question(request, self.policy))
        with calling() as call:
            for data in call.events(CHAT, body):
                if data == "[DONE]":
                    return answer.whole()
                event = answer.add(data)
                if event is not None:
                    channel.put(event)
        raise BROKEN

    def _embed(self, request: EmbedRequest, channel: Channel, calling: Calling) -> EmbedResult:
        found: list[EmbedResult] = []
        done = 0
        for group in items(request, self.policy):
            channel.check()
            channel.put(ProgressEvent("embedding", done, len(request.items)))
            try:
                with calling(silence=MAKING_VECTORS) as call:
                    body = self._named(embedding(request, group))
                    found.append(vectors(call.ask("POST", EMBEDDINGS, body)))
            except PluginError as error:
                raise renumbered(error, done) from None
            done += len(group)
        if found:
            together = tuple(vector for part in found for vector in part.vectors)
            return replace(found[0], vectors=together)
        # No items: no vectors, of the right width, which no server is asked for.
        info = self.info()
        (dim,) = [space.dim for space in info.spaces if space.id == request.space] or [0]
        return EmbedResult(
            (), request.space, dim, info.id, info.revision, "", request.normalize, info.quantization
        )

    def _describe(
        self, request: DescribeRequest, channel: Channel, calling: Calling
    ) -> DescribeResult:
        with calling() as call:
            for data in call.events(DESCRIBE, self._named(description(request, self.policy))):
                read = event(data)
                if isinstance(read, DoneEvent) and isinstance(read.result, DescribeResult):
                    return read.result
                if isinstance(read, ErrorEvent):
                    raise read.error
                if not isinstance(read, UsageEvent):
                    channel.put(read)
        raise BROKEN

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self._model is None else {**body, "model": self._model}
