"""A backend without weights, for the tests of a host: it answers at once and always the same, or
slowly, or fails where it is set to. Queue, limits, media policy, cancellation and errors are the
real ones; standard library only.
"""

import hashlib
import json
import math
import re
import time
import zlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Any, get_args

from mlx_onevision.plugins.contract import requests, results
from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import DescribeResult, EmbedResult, GenerateResult
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import Limits, Service, model_died
from mlx_onevision.sampling.detokenizer import StopStrings

VECTOR_DIM = 16  # of a vector
VIDEO_SECONDS = 30.0  # how long every video is
MAX_SEGMENTS = 100_000  # as the engine
POLL_INTERVAL_SECONDS = 0.005

MODEL_INFO = results.ModelInfo(
    id="fake",
    revision="1",
    context=32768,
    capabilities=get_args(results.Capability),
    spaces=(
        results.Space("vision", VECTOR_DIM, ("image", "video"), trained=False),
        results.Space("joint", VECTOR_DIM, ("text", "image", "video"), trained=False),
    ),
)


class FakeBackend(Service):
    """A backend that is set to what it answers, and to how it fails.

    pieces : what every answer consists of; without them it repeats the question and counts what
        came with it. Where a schema is asked for, it is a document of that instead.
    delay : seconds before each piece, each item that is embedded, each segment.
    load_seconds : how long loading takes.
    fail_at : the piece, item or segment, from 0 on, in whose place ``error`` is raised.
    fail_load : raised instead of loading.
    die_at : the piece, item or segment in whose place it dies, with all that is under way.
    without : capabilities that it does not claim, and whose requests it refuses.
    """

    def __init__(
        self,
        *,
        pieces: Sequence[str] | None = None,
        delay: float = 0.0,
        load_seconds: float = 0.0,
        fail_at: int | None = None,
        error: BaseException | None = None,
        fail_load: BaseException | None = None,
        die_at: int | None = None,
        without: Sequence[results.Capability] = (),
        policy: MediaPolicy | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.loads = 0
        """How often it was loaded."""
        self.steps = 0
        """Pieces, items and segments that were worked on, those of cancelled requests too."""
        self._pieces, self._delay, self._load_seconds = pieces, delay, load_seconds
        self._fail_at, self._fail_load, self._die_at = fail_at, fail_load, die_at
        self._alive = True
        self._error = error or PluginError("internal", "the fake backend was set to fail")
        self._claimed: tuple[results.Capability, ...] = tuple(
            claim for claim in MODEL_INFO.capabilities if claim not in without
        )
        spaces = MODEL_INFO.spaces if "embed" in self._claimed else ()
        info = replace(MODEL_INFO, capabilities=self._claimed, spaces=spaces)
        super().__init__(self._load, lambda: info, policy=policy, limits=limits)

    def _load(self) -> "FakeBackend._Model":
        time.sleep(self._load_seconds)
        if self._fail_load is not None:
            raise self._fail_load
        self.loads += 1
        return FakeBackend._Model(self)

    def _step(self, place: int, channel: Channel) -> None:
        """Takes its time, and fails where it should."""
        until = time.monotonic() + self._delay
        self._look(channel)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_INTERVAL_SECONDS))
            self._look(channel)
        if place == self._die_at:
            self._alive = False
            raise model_died()
        if place == self._fail_at:
            raise self._error
        self.steps += 1

    def _look(self, channel: Channel) -> None:
        channel.check()
        if not self._alive:
            raise model_died()

    class _Model:
        def __init__(self, owner: "FakeBackend") -> None:
            self._owner = owner

        @property
        def healthy(self) -> bool:
            return self._owner._alive

        def generate(self, request: GenerateRequest, channel: Channel) -> GenerateResult:
            requests.require_capability(request, self._owner._claimed)
            channel.put(results.ProgressEvent("preparing"))
            pieces = self._owner._pieces or _answer(request.messages)
            if request.json_schema is not None:
                pieces = document(request.json_schema)
            for medium in request.media:
                _read(medium, self._owner.policy)
                channel.check()
            words = sum(len(p.split()) for m in request.messages for p in m.parts if type(p) is str)
            prompt = words + 196 * len(request.media)
            if prompt >= MODEL_INFO.context:
                message = (
                    f"the prompt has {prompt} tokens, but the context holds {MODEL_INFO.context}"
                )
                raise PluginError("context_overflow", message, "use fewer media or a shorter text")
            channel.put(results.ProgressEvent("answering"))
            stop, logprobs = StopStrings(request.stop), _Logprobs(request.logprobs)
            text, count = "", 0
            finish: results.FinishReason = "stop"

            def emit(piece: str) -> str:
                if piece:
                    channel.put(results.TextEvent(piece, logprobs=logprobs.emit(piece)))
                return piece

            max_tokens = request.max_tokens or self._owner.limits.default_for(None)
            for place, piece in enumerate(pieces):
                if place == max_tokens:
                    finish = "length"
                    break
                self._owner._step(place, channel)
                count += 1
                logprobs.add(piece)
                text += emit(stop.add(piece))
                if stop.found is not None:
                    break
            text += emit(stop.finish())
            usage = results.Usage(
                prompt_tokens=prompt, media_tokens=196 * len(request.media), completion_tokens=count
            )
            return GenerateResult(text, finish, usage, logprobs=logprobs.all)

        def embed(self, request: EmbedRequest, channel: Channel) -> EmbedResult:
            requests.require_capability(request, self._owner._claimed)
            policy = self._owner.policy
            vectors: list[tuple[float, ...]] = []
            for place, item in enumerate(request.items):
                channel.put(results.ProgressEvent("embedding", place, len(request.items)))
                self._owner._step(place, channel)
                media = item.media if isinstance(item, requests.Group) else [item]
                try:
                    parts = [m.encode() if isinstance(m, str) else _read(m, policy) for m in media]
                except PluginError as error:
                    raise error.of(f"item {place + 1}") from None
                vectors.append(_vector(b"\0".join(parts), request.normalize))
            made = (VECTOR_DIM, MODEL_INFO.id, MODEL_INFO.revision, "hash", request.normalize)
            return EmbedResult(tuple(vectors), request.space, *made)

        def describe_video(self, request: DescribeRequest, channel: Channel) -> DescribeResult:
            requests.require_capability(request, self._owner._claimed)
            channel.put(results.ProgressEvent("preparing"))
            _read(request.video, self._owner.policy)
            first, last = request.start or 0.0, min(request.end or VIDEO_SECONDS, VIDEO_SECONDS)
            if first >= last:
                raise bad_request(f"start is {first:g} s, behind the video's end")
            window = request.segments if request.segments != "scenes" else 10.0
            if (last - first) / window > MAX_SEGMENTS:
                many = f"{last - first:g} s in segments of {window:g} s are more than"
                raise bad_request(f"{many} {MAX_SEGMENTS} segments", "use longer ones")
            segments: list[results.Segment] = []
            count = math.ceil((last - first) / window)
            for place in range(count):
                self._owner._step(place, channel)
                begin = first + place * window
                text = f"This is part {place + 1}."
                channel.put(results.TextEvent(text, segment=place))
                segments.append(
                    results.Segment(place, begin, min(begin + window, last), text, (begin,))
                )
                channel.put(results.SegmentEvent(segments[-1]))
                channel.put(results.ProgressEvent("describing", place + 1, count))
            return DescribeResult(
                duration=VIDEO_SECONDS,
                segments=tuple(segments),
                summary=f"A video of {count} parts.",
                chapters=(results.Chapter(first, "All of it"),),
            )

        def close(self) -> None:
            """Nothing is held."""


def _read(medium: requests.Media, policy: MediaPolicy) -> bytes:
    source = policy.open(medium)
    if isinstance(source, bytes):
        data = source
    else:
        with source:
            data = source.read()
    if requests.sniff(data) != medium.kind:
        given = "bytes" if medium.data else "a path" if medium.path else "a URL"
        message = f"the {medium.kind} given as {given} is no {medium.kind}"
        hint = "send an image or a video in a usual format"
        raise PluginError("unsupported_media", message, hint)
    return data


# Fake answers: the question again, vectors made of bytes, and logprobs. Always the same.


def _answer(messages: Sequence[requests.Message]) -> list[str]:
    """The last text, word by word, and how many media came with all of them."""
    texts = [part for message in messages for part in message.parts if isinstance(part, str)]
    media = [medium for message in messages for medium in message.media]
    pieces = [f"{word} " for word in (texts[-1].split() if texts else [])]
    for kind in ("image", "video"):
        count = sum(medium.kind == kind for medium in media)
        pieces.append(f"[{count} {kind}{'' if count == 1 else 's'}]")
    return pieces


def _vector(data: bytes, normalize: bool) -> tuple[float, ...]:
    digest = hashlib.blake2b(data, digest_size=VECTOR_DIM).digest()
    values = [byte - 127.5 for byte in digest]
    length = math.hypot(*values) if normalize else 1.0
    return tuple(value / length for value in values)


class _Logprobs:
    """Logprobs of the pieces of an answer, which are emitted once their text has been.

    count : how many alternatives; None for no logprobs.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._waiting: deque[tuple[int, results.TokenLogprob]] = deque()
        self._added = self._emitted = 0
        self._all: list[results.TokenLogprob] = []

    def add(self, piece: str) -> None:
        if self._count is not None:
            self._waiting.append((self._added, _logprob(piece, self._count)))
            self._added += len(piece)

    def emit(self, text: str) -> tuple[results.TokenLogprob, ...]:
        """Those of the pieces that begin before the end of a text that is emitted."""
        self._emitted += len(text)
        first = len(self._all)
        while self._waiting and self._waiting[0][0] < self._emitted:
            self._all.append(self._waiting.popleft()[1])
        return tuple(self._all[first:])

    @property
    def all(self) -> tuple[results.TokenLogprob, ...] | None:
        return None if self._count is None else tuple(self._all)


def _logprob(piece: str, count: int) -> results.TokenLogprob:
    data = piece.encode()
    value = -0.01 - zlib.crc32(data) % 64 / 100
    others = [(f"other {n}", value - 1.0 - n) for n in range(1, count)]
    top = [(piece, value), *others][:count]
    return results.TokenLogprob(
        piece, data, value, tuple(results.TopLogprob(t, t.encode(), p) for t, p in top)
    )


# Fake documents: what a JSON Schema allows. The usual keywords are known, others are refused.

_ANNOTATION_KEYWORDS = set(
    "$defs $id $schema default definitions description examples title x-guidance".split()
)
_RANGE_KEYWORDS = {
    "array": ("minItems", "maxItems"),
    "string": ("minLength", "maxLength"),
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
}
_UNION_KEYWORDS = ({"anyOf"}, {"oneOf"})
_KNOWN_KEYWORDS = {
    "additionalProperties",
    "const",
    "enum",
    "items",
    "properties",
    "required",
    "type",
}


def document(schema: str) -> list[str]:
    """A document that a JSON Schema allows, always the same, in pieces. Raises PluginError."""
    whole = json.loads(schema)
    try:
        text = json.dumps(_document(whole, whole, 0), ensure_ascii=False)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        raise bad_request("the JSON schema allows no document", "change it") from None
    return re.findall(r"\s*(?:\w+|.)", text, re.DOTALL)


def _part(schema: Any, name: str) -> Any:
    return schema[int(name) if isinstance(schema, list) else name]


def _document(schema: Any, whole: dict[str, Any], depth: int) -> Any:
    if schema is True:
        return None
    if schema is False or depth > 16:
        raise LookupError("nothing is allowed")
    get, given, kind = schema.get, schema.keys() - _ANNOTATION_KEYWORDS, schema.get("type", "null")
    options: list[Any] | None = get("anyOf", get("oneOf")) if given in _UNION_KEYWORDS else None
    if given == {"$ref"}:
        path = [key.replace("~1", "/") for key in get("$ref").split("/")[1:]]
        options = [reduce(_part, path, whole)]
    elif isinstance(schema.get("type"), list):
        options = [{**schema, "type": one} for one in kind]
    elif options is None and (unknown := given - _KNOWN_KEYWORDS.union(*_RANGE_KEYWORDS.values())):
        raise bad_request(f"the JSON schema has {min(unknown)!r}, which is not supported here")
    for option in options or ():
        with suppress(LookupError):
            return _document(option, whole, depth + 1)
    if options is not None or {"const", "enum"} & given:
        return schema["const"] if "const" in given else get("enum", [])[0]
    if kind == "object":
        parts, rest = get("properties", {}), get("additionalProperties", True)
        return {
            name: _document(parts.get(name, rest), whole, depth + 1) for name in get("required", ())
        }
    if kind in ("boolean", "null"):
        return True if kind == "boolean" else None
    least, most = _RANGE_KEYWORDS[str(kind)]
    low, high = get(least, 1), get(most, max(get(least, 1), 1))
    if kind != "number":
        low, high = math.ceil(low), math.floor(high)
    value = min(max(1, low), high)
    if value < get(least, value) or (least != "minimum" and value > 1000):
        raise LookupError("the bounds leave nothing")
    if kind == "array":
        return [_document(get("items", True), whole, depth + 1)] * value
    return "x" * value if kind == "string" else value
