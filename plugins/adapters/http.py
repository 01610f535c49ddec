"""A server of ``mlx-onevision serve`` as a backend.

    with open_backend("http", url="http://127.0.0.1:8000") as backend:
        ...

Requests are sent as OpenAI's clients send them, with this server's additions, over its public
routes. Images and videos are read here and sent as data.
"""

import base64
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any
from urllib.parse import quote

from mlx_onevision.plugins.adapters.http_call import (
    READ_TIMEOUT_SECONDS,
    Call,
    Server,
    error_of,
    strange,
)
from mlx_onevision.plugins.contract import requests, results
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DescribeResult, EmbedResult, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.base import Request, RequestQueue, StreamingBackend
from mlx_onevision.plugins.service.media_policy import MediaPolicy

# Seconds without a byte: the server sends none until all vectors are there.
EMBED_TIMEOUT_SECONDS = 3600.0
INFO_TIMEOUT_SECONDS = 30.0

# What a server takes in one request of embeddings; more is sent in several.
MAX_ITEMS_PER_REQUEST = 256
MAX_BYTES_PER_REQUEST = 24 << 20
# As the policy of a server that was not set otherwise; the one here may be wider.
MAX_MEDIA_PER_REQUEST = {"image": MediaPolicy.images, "video": MediaPolicy.videos}

# Fields that are sent under their own names; the server's are the contract's.
_GENERATE_FIELDS = tuple(
    field.name
    for field in fields(GenerateRequest)
    if field.name not in ("messages", "system", "stop", "logprobs", "json_schema", "logit_bias")
)
_DESCRIBE_FIELDS = tuple(field.name for field in fields(DescribeRequest) if field.name != "video")
_EMBED_FIELDS = ("space", "normalize", "tiling", "timeout")

_ITEM_NUMBER = re.compile(r"item (\d+): ")


class HttpBackend(StreamingBackend):
    """A :class:`~mlx_onevision.plugins.interface.Backend`. Closing it leaves the server as it is.

    Vectors arrive as float32.

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
        super().__init__(policy, RequestQueue(sys.maxsize, 0))  # the server's queue is what counts
        self._server, self._model, self._timeout = Server(url, token), model, timeout

    def info(self) -> results.ModelInfo:
        """What the server says. Raises PluginError, ``model_not_found`` where there is none."""
        route = "/v1/models"
        if self._model is not None:
            route += "/" + quote(self._model, safe="/")
        body = Call(self._server, read_timeout=INFO_TIMEOUT_SECONDS).ask("GET", route)
        with _reading():
            found = body["data"][0] if self._model is None else body
            names = [field.name for field in fields(results.ModelInfo) if field.name in found]
            return results.ModelInfo.from_dict(
                {name: found[name] for name in ("api_version", *names)}
            )

    def unload(self) -> None:
        """Nothing: the model belongs to whoever started the server, which has no route that frees
        it. Its ``--keep-alive`` does.
        """

    def _time_limit(self, request: Request) -> float | None:
        return self._timeout

    def _serve(self, request: Request, channel: Channel) -> results.Result:
        if isinstance(request, GenerateRequest):
            return self._generate(request, channel)
        if isinstance(request, EmbedRequest):
            return self._embed(request, channel)
        return self._describe(request, channel)

    def _call(self, channel: Channel, read_timeout: float = READ_TIMEOUT_SECONDS) -> Call:
        """A call that is cut off when the request ends."""
        call = Call(self._server, read_timeout=read_timeout)
        channel.at_end(call.cut)
        return call

    def _body(self, request: Request, names: tuple[str, ...], **more: Any) -> dict[str, Any]:
        values = {name: getattr(request, name) for name in names} | {"model": self._model}
        return {name: value for name, value in values.items() if value is not None} | more

    def _generate(self, request: GenerateRequest, channel: Channel) -> GenerateResult:
        system = [] if request.system is None else [requests.Message("system", request.system)]
        messages = [
            {"role": turn.role, "content": [_part(part, self.policy) for part in turn.parts]}
            for turn in (*system, *request.messages)
        ]
        more: dict[str, Any] = {"stop": list(request.stop)} if request.stop else {}
        if request.logit_bias is not None:
            more["logit_bias"] = {str(one.token): one.bias for one in request.logit_bias}
        if request.logprobs is not None:
            more |= {"logprobs": True, "top_logprobs": request.logprobs}
        if request.json_schema is not None:
            schema = {"name": "answer", "strict": True, "schema": json.loads(request.json_schema)}
            more["response_format"] = {"type": "json_schema", "json_schema": schema}
        more |= {"stream": True, "stream_options": {"include_usage": True}}
        body = self._body(request, _GENERATE_FIELDS, messages=messages, **more)
        answer = _Completion(request.logprobs is not None)
        for data in self._call(channel).events("/v1/chat/completions", body):
            if data == "[DONE]":
                return answer.result()
            event = answer.add(data)
            if event is not None:
                channel.put(event)
        raise _broken_off()

    def _embed(self, request: EmbedRequest, channel: Channel) -> EmbedResult:
        found: list[EmbedResult] = []
        done = 0
        for group in _groups(request, self.policy):
            channel.check()
            channel.put(results.ProgressEvent("embedding", done, len(request.items)))
            body = self._body(request, _EMBED_FIELDS, input=group, encoding_format="base64")
            try:
                answer = self._call(channel, EMBED_TIMEOUT_SECONDS).ask(
                    "POST", "/v1/embeddings", body
                )
                found.append(_embeddings(answer))
            except PluginError as error:
                raise _renumbered(error, done) from None
            done += len(group)
        if found:
            together = tuple(vector for part in found for vector in part.vectors)
            return replace(found[0], vectors=together)
        # No server is asked to embed nothing: the empty result's ``dim`` is what info() says.
        info = self.info()
        (dim,) = [space.dim for space in info.spaces if space.id == request.space] or [0]
        return EmbedResult(
            (), request.space, dim, info.id, info.revision, "", request.normalize, info.quantization
        )

    def _describe(self, request: DescribeRequest, channel: Channel) -> DescribeResult:
        # ``longest`` is sent as null, too: left out, it would have the server's default.
        video = _data_url(request.video, self.policy)
        body = self._body(request, _DESCRIBE_FIELDS, video=video, longest=request.longest)
        for data in self._call(channel).events("/v1/video/describe", body):
            with _reading():
                event = results.event_from_dict(json.loads(data))
            if isinstance(event, results.DoneEvent) and isinstance(event.result, DescribeResult):
                return event.result
            if isinstance(event, results.ErrorEvent):
                raise event.error
            if not isinstance(event, results.UsageEvent):
                channel.put(event)
        raise _broken_off()


# What is sent.


def _groups(request: EmbedRequest, policy: MediaPolicy) -> Iterator[list[dict[str, Any]]]:
    """The items, in groups that a server takes at once, no more than one of which is ever held.
    Raises PluginError: for an item that the policy does not let be read, naming it.
    """
    group: list[dict[str, Any]] = []
    size, held = 0, Counter[str]()
    for number, item in enumerate(request.items, 1):
        try:
            if isinstance(item, requests.Group):
                content = [_part(medium, policy) for medium in item.media]
                part = {"type": "group", "content": content}
            else:
                part = _part(item, policy)
        except PluginError as error:
            raise error.of(f"item {number}") from None
        length = len(json.dumps(part))
        media = item.media if isinstance(item, requests.Group) else (item,)
        kinds = Counter(medium.kind for medium in media if isinstance(medium, requests.Media))
        if group and (
            size + length > MAX_BYTES_PER_REQUEST
            or len(group) == MAX_ITEMS_PER_REQUEST
            or any(held[kind] + kinds[kind] > MAX_MEDIA_PER_REQUEST[kind] for kind in kinds)
        ):
            yield group
            group, size, held = [], 0, Counter[str]()
        group.append(part)
        size += length
        held.update(kinds)
    if group:
        yield group


def _part(part: str | requests.Media, policy: MediaPolicy) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = f"{part.kind}_url"
    return {"type": kind, kind: _data_url(part, policy)}


def _data_url(medium: requests.Media, policy: MediaPolicy) -> dict[str, str]:
    source = policy.open(medium)
    if not isinstance(source, bytes):
        with source:
            source = source.read(policy.size + 1)
        if source:  # a video is sent whole, so it is bounded as an image is
            policy.admit([requests.Media(medium.kind, data=source)])
    text = base64.b64encode(source).decode("ascii")
    return {"url": f"data:{medium.kind}/*;base64,{text}"}


# What is answered.


def _broken_off() -> PluginError:
    """A new one each time: an exception keeps the frames it went through, and their requests."""
    return PluginError(
        "internal", "the answer broke off before its end", "the log of the server may say more"
    )


class _Completion:
    """The chunks of a chat completion, put together.

    logprobs : whether they were asked for.
    """

    def __init__(self, logprobs: bool) -> None:
        self._asked, self._begun = logprobs, False
        self._text: list[str] = []
        self._logprobs: list[results.TokenLogprob] = []
        self._finish: results.FinishReason | None = None
        self._usage: results.Usage | None = None
        self._notes: tuple[str, ...] = ()

    def add(self, data: str) -> results.Event | None:
        """The event that a chunk is, where it is one. Raises PluginError: the error that a chunk
        holds.
        """
        with _reading():
            chunk = json.loads(data)
            refused = error_of(chunk) if "error" in chunk else None
        if refused is not None:
            raise refused
        with _reading():
            if chunk.get("usage") is not None:
                self._usage = _usage(chunk["usage"])
            self._notes += tuple(chunk.get("notes", ()))
            for choice in chunk["choices"]:
                reason = choice.get("finish_reason")
                if reason is not None:
                    self._finish = "length" if reason == "length" else "stop"
                delta, logprobs = choice["delta"].get("content") or "", _logprobs(choice)
                if delta or logprobs:
                    self._text.append(delta)
                    self._logprobs += logprobs
                    return results.TextEvent(delta, logprobs=logprobs)
            if not self._begun:
                self._begun = True
                return results.ProgressEvent("answering")
        return None

    def result(self) -> GenerateResult:
        """The answer. Raises PluginError when its end is missing."""
        if self._finish is None or self._usage is None:
            raise _broken_off()
        logprobs = tuple(self._logprobs) if self._asked else None
        return GenerateResult("".join(self._text), self._finish, self._usage, self._notes, logprobs)


@contextmanager
def _reading() -> Generator[None]:
    """Whatever cannot be read is the server's fault, not the request's."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, struct.error, PluginError) as error:
        raise strange("what the server answers cannot be read") from error


def _embeddings(body: Any) -> EmbedResult:
    with _reading():
        names = [field.name for field in fields(EmbedResult) if field.name != "vectors"]
        coded = [base64.b64decode(item["embedding"], validate=True) for item in body["data"]]
        vectors = tuple(struct.unpack(f"<{len(data) // 4}f", data) for data in coded)
        return EmbedResult(vectors=vectors, **{name: body[name] for name in names})


def _renumbered(error: PluginError, before: int) -> PluginError:
    """An error that names an item of a group, with the item's number among all of them."""
    found = _ITEM_NUMBER.match(error.message)
    if found is None or not before:
        return error
    message = f"item {int(found[1]) + before}: {error.message[found.end() :]}"
    return PluginError(error.code, message, error.hint)


def _usage(body: Mapping[str, Any]) -> results.Usage:
    seconds = {f"{name}_seconds": value for name, value in body["seconds"].items()}
    flat = {**body, **body["prompt_tokens_details"], **seconds}
    return results.Usage(**{field.name: flat[field.name] for field in fields(results.Usage)})


def _logprobs(choice: Mapping[str, Any]) -> tuple[results.TokenLogprob, ...]:
    logprobs: Mapping[str, Any] = choice.get("logprobs") or {}
    content: Sequence[Mapping[str, Any]] = logprobs.get("content") or ()
    return tuple(
        results.TokenLogprob(
            *_token(one), top=tuple(results.TopLogprob(*_token(o)) for o in one["top_logprobs"])
        )
        for one in content
    )


def _token(values: Mapping[str, Any]) -> tuple[str, bytes, float]:
    return values["token"], bytes(values["bytes"]), values["logprob"]
