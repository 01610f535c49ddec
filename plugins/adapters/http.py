"""A server of ``mlx-onevision serve`` as a backend; standard library only.

    with open_backend("http", url="http://127.0.0.1:8000") as backend:
        ...

What crosses over is what OpenAI's clients send and this server adds to it, over its public routes.
Pictures and videos are read here and go along as data.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from mlx_onevision.plugins.adapters import answers, bodies
from mlx_onevision.plugins.adapters.http_call import Call, Server
from mlx_onevision.plugins.contract.errors import PluginError, bad_request, cancelled
from mlx_onevision.plugins.contract.events import (
    DoneEvent,
    ErrorEvent,
    ProgressEvent,
    Result,
    UsageEvent,
)
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import (
    DescribeResult,
    EmbedResult,
    GenerateResult,
    ModelInfo,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream
from mlx_onevision.plugins.contract.wording import worded
from mlx_onevision.plugins.service.media_policy import MediaPolicy

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
        return answers.model_info(found)

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
            channel.fail(cancelled() if channel.ended else worded(error))
        finally:
            with self._lock:
                self._channels.discard(channel)
                self._threads.discard(threading.current_thread())

    def _generate(
        self, request: GenerateRequest, channel: Channel, calling: Calling
    ) -> GenerateResult:
        answer = answers.Answer(request.logprobs is not None)
        body = self._named(bodies.question(request, self.policy))
        with calling() as call:
            for data in call.events(CHAT, body):
                if data == "[DONE]":
                    return answer.whole()
                event = answer.add(data)
                if event is not None:
                    channel.put(event)
        raise answers.BROKEN

    def _embed(self, request: EmbedRequest, channel: Channel, calling: Calling) -> EmbedResult:
        found: list[EmbedResult] = []
        done = 0
        for group in bodies.items(request, self.policy):
            channel.check()
            channel.put(ProgressEvent("embedding", done, len(request.items)))
            try:
                with calling(silence=MAKING_VECTORS) as call:
                    body = self._named(bodies.embedding(request, group))
                    found.append(answers.vectors(call.ask("POST", EMBEDDINGS, body)))
            except PluginError as error:
                raise answers.renumbered(error, done) from None
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
            for data in call.events(
                DESCRIBE, self._named(bodies.description(request, self.policy))
            ):
                event = answers.event(data)
                if isinstance(event, DoneEvent) and isinstance(event.result, DescribeResult):
                    return event.result
                if isinstance(event, ErrorEvent):
                    raise event.error
                if not isinstance(event, UsageEvent):
                    channel.put(event)
        raise answers.BROKEN

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return body if self._model is None else {**body, "model": self._model}
