"""A backend without weights, for the tests of a host: it answers at once and always the same, or
slowly, or fails where it is told to. Queue, limits, media policy, cancellation and errors are the
real ones; standard library only.
"""

import hashlib
import json
import math
import re
import time
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Group,
    Media,
    Message,
    require_capability,
    sniff,
)
from mlx_onevision.plugins.contract.results import (
    Capability,
    Chapter,
    DescribeResult,
    EmbedResult,
    FinishReason,
    GenerateResult,
    ModelInfo,
    ProgressEvent,
    Segment,
    SegmentEvent,
    Space,
    TextEvent,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import DEAD, Limits, Service
from mlx_onevision.sampling.detokenizer import StopStrings

# A document of a JSON Schema, always the same, for a backend without a model; standard library
# only. It knows the usual keywords; others are refused.

DEEPEST = 16  # references and parts within each other

KNOWN = frozenset(
    """$comment $defs $id $ref $schema additionalProperties allOf anyOf const default definitions
    deprecated description enum examples exclusiveMaximum exclusiveMinimum items maxItems maxLength
    maximum minItems minLength minimum oneOf prefixItems properties required title type""".split()
)
SAYINGS = ("title", "description", "default", "examples", "$comment")
MOST_ITEMS = 1000


def document(schema: str) -> list[str]:
    """A document that a JSON Schema allows, always the same, in pieces.

    Raises:
        PluginError: ``bad_request``, for keywords that are not known here, and where there is none.
    """
    whole = json.loads(schema)
    try:
        text = json.dumps(_value(whole, whole, 0), ensure_ascii=False)
    except (AttributeError, TypeError, ValueError, OverflowError):  # keywords of other types
        raise bad_request("the JSON schema is no JSON Schema") from None
    return re.findall(r"\s*(?:\w+|.)", text, re.DOTALL)


class _Nothing(Exception):
    """There is no such value."""


def _value(schema: Any, whole: Any, depth: int) -> Any:
    try:
        return _made(schema, whole, depth)
    except _Nothing:
        if depth:
            raise
        raise bad_request("the JSON schema allows no document", "change it") from None


def _made(schema: Any, whole: Any, depth: int) -> Any:
    if schema is True:
        return None
    if not isinstance(schema, Mapping) or depth > DEEPEST:
        raise _Nothing
    unknown = sorted(schema.keys() - KNOWN)
    if unknown:
        raise bad_request(f"the JSON schema has {unknown[0]!r}, which is not supported")
    if "$ref" in schema:
        return _value(_merged([schema, _target(schema["$ref"], whole)], "$ref"), whole, depth + 1)
    if "allOf" in schema:
        return _value(_merged([schema, *schema["allOf"]], "allOf"), whole, depth + 1)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            parts = [_merged([schema, part], name) for part in schema[name]]
            return _first(parts, whole, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        if not schema["enum"]:
            raise _Nothing
        return schema["enum"][0]
    kind = schema.get("type", _kind(schema))
    if isinstance(kind, list):
        return _first([{**schema, "type": one} for one in kind], whole, depth)
    if kind == "object":
        return _object(schema, whole, depth)
    if kind == "array":
        return list(_items(schema, whole, depth))
    if kind == "string":
        least, most = schema.get("minLength", 0), schema.get("maxLength", MOST_ITEMS)
        if least > most:
            raise _Nothing
        return "text"[:most].ljust(least, "x")
    if kind in ("integer", "number"):
        return _integer(schema) if kind == "integer" else _number(schema)
    if kind in ("boolean", "null"):
        return True if kind == "boolean" else None
    raise bad_request(f"the JSON schema has the type {kind!r}, which does not exist")


def _kind(schema: Mapping[str, Any]) -> str:
    """The type that the keywords of a schema without one are about."""
    named = {"properties": "object", "required": "object", "items": "array", "minItems": "array"}
    named |= {"minLength": "string", "maxLength": "string", "minimum": "number"}
    return next((kind for name, kind in named.items() if name in schema), "null")


def _first(schemas: Sequence[Any], whole: Any, depth: int) -> Any:
    for schema in schemas:
        try:
            return _value(schema, whole, depth or 1)
        except _Nothing:
            pass
    raise _Nothing


def _merged(parts: Sequence[Any], without: str) -> Any:
    """One schema for several that all hold, without the keyword of the first that named them."""
    if False in parts:
        raise _Nothing
    made: dict[str, Any] = {}
    for place, part in enumerate(part for part in parts if part is not True):
        for key, value in part.items():
            if place == 0 and key == without:
                continue
            before = made.setdefault(key, value)
            if key in ("properties", "$defs", "definitions"):
                both = {
                    name: {"allOf": [before[name], value[name]]}
                    for name in before.keys() & value.keys()
                }
                made[key] = {**before, **value, **(both if before is not value else {})}
            elif key == "required":
                made[key] = [*before, *value]
            elif before != value and key not in SAYINGS:
                raise bad_request(f"the JSON schema says two things about {key}")
    return made


def _target(reference: str, whole: Any) -> Any:
    found = whole
    for key in reference.removeprefix("#").split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or key not in found:
            raise bad_request(f"the JSON schema has no {reference[:80]!r}")
        found = found[key]
    return found


def _object(schema: Mapping[str, Any], whole: Any, depth: int) -> dict[str, Any]:
    required, known = schema.get("required", []), schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    made: dict[str, Any] = {}
    for name in [*known, *(name for name in required if name not in known)]:
        try:
            made[name] = _value(known.get(name, others), whole, depth + 1)
        except _Nothing:
            if name in required:
                raise
    return made


def _items(schema: Mapping[str, Any], whole: Any, depth: int) -> Iterator[Any]:
    first = schema.get("prefixItems", [])
    least, most = schema.get("minItems", 0), schema.get("maxItems", MOST_ITEMS)
    if least > most:
        raise _Nothing
    for place in range(min(max(least, len(first), 1), most)):
        try:
            part = first[place] if place < len(first) else schema.get("items", True)
            yield _value(part, whole, depth + 1)
        except _Nothing:
            if place < least:
                raise
            return


def _integer(schema: Mapping[str, Any]) -> int:
    """1, or what is nearest to it."""
    low = max(
        math.ceil(schema["minimum"]) if "minimum" in schema else -(1 << 63),
        math.floor(schema["exclusiveMinimum"]) + 1 if "exclusiveMinimum" in schema else -(1 << 63),
    )
    high = min(
        math.floor(schema["maximum"]) if "maximum" in schema else 1 << 63,
        math.ceil(schema["exclusiveMaximum"]) - 1 if "exclusiveMaximum" in schema else 1 << 63,
    )
    if low > high:
        raise _Nothing
    return min(max(1, low), high)


def _number(schema: Mapping[str, Any]) -> float:
    """In the middle of what is allowed."""
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    if low > high or (low == high and {"exclusiveMinimum", "exclusiveMaximum"} & schema.keys()):
        raise _Nothing
    if math.isinf(low):
        return 1.5 if math.isinf(high) else high - 1
    return low + 1 if math.isinf(high) else (low + high) / 2


# What a backend without a model says: the question again, vectors made of bytes, and how likely
# all that was. Always the same; standard library only.

DIM = 16


def answer(messages: Sequence[Message]) -> list[str]:
    """What was asked last, word by word, and what came with all of it."""
    said = [part for message in messages for part in message.parts if isinstance(part, str)]
    media = [medium for message in messages for medium in message.media]
    pieces = [f"{word} " for word in (said[-1].split() if said else [])]
    for kind in ("image", "video"):
        count = sum(medium.kind == kind for medium in media)
        pieces.append(f"[{count} {kind}{'' if count == 1 else 's'}]")
    return pieces


def vector(data: bytes, normalize: bool) -> tuple[float, ...]:
    digest = hashlib.blake2b(data, digest_size=DIM).digest()
    values = [byte - 127.5 for byte in digest]
    length = math.sqrt(sum(value * value for value in values)) if normalize else 1.0
    return tuple(value / length for value in values)


class Likelihoods:
    """Of the pieces of an answer, made up but always the same; told as their text is shown.

    count : how many of each place; None tells nothing.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        self._given = self._shown = 0
        self._told: list[TokenLogprob] = []

    def add(self, piece: str) -> None:
        """A piece has come; what of it is shown is not known yet."""
        if self._count is not None:
            self._waiting.append((self._given, _told(piece, self._count)))
            self._given += len(piece)

    def show(self, text: str) -> tuple[TokenLogprob, ...]:
        """A text that is shown, and with it the pieces that begin before its end."""
        self._shown += len(text)
        news: list[TokenLogprob] = []
        while self._waiting and self._waiting[0][0] < self._shown:
            news.append(self._waiting.popleft()[1])
        self._told += news
        return tuple(news)

    @property
    def told(self) -> tuple[TokenLogprob, ...] | None:
        return None if self._count is None else tuple(self._told)


def _told(piece: str, count: int) -> TokenLogprob:
    data = piece.encode()
    likely = -0.01 - zlib.crc32(data) % 64 / 100
    others = [(f"other {n}", likely - 1.0 - n) for n in range(1, count)]
    top = [(piece, likely), *others][:count]
    return TokenLogprob(
        piece, data, likely, tuple(TopLogprob(word, word.encode(), p) for word, p in top)
    )


SECONDS = 30.0  # how long every video is
MOST_SEGMENTS = 100_000  # as the engine
POLL_SECONDS = 0.005

INFO = ModelInfo(
    id="fake",
    revision="1",
    context=32768,
    capabilities=(
        *("generate", "embed", "describe_video", "images", "videos"),
        *("logprobs", "json_schema"),
    ),
    spaces=(
        Space("vision", DIM, ("image", "video"), trained=False),
        Space("joint", DIM, ("text", "image", "video"), trained=False),
    ),
)


class FakeBackend(Service):
    """pieces : what every answer consists of; without them it repeats the question and counts what
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
        without: Sequence[Capability] = (),
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
        self._error = error or PluginError("internal", "the fake backend was told to fail")
        self._claimed: tuple[Capability, ...] = tuple(
            claim for claim in INFO.capabilities if claim not in without
        )
        spaces = INFO.spaces if "embed" in self._claimed else ()
        info = replace(INFO, capabilities=self._claimed, spaces=spaces)
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
            time.sleep(min(left, POLL_SECONDS))
            self._look(channel)
        if place == self._die_at:
            self._alive = False
            raise DEAD
        if place == self._fail_at:
            raise self._error
        self.steps += 1

    def _look(self, channel: Channel) -> None:
        channel.check()
        if not self._alive:
            raise DEAD

    class _Model:
        def __init__(self, owner: "FakeBackend") -> None:
            self._owner = owner

        @property
        def healthy(self) -> bool:
            return self._owner._alive

        def generate(
            self, request: GenerateRequest, policy: MediaPolicy, channel: Channel
        ) -> GenerateResult:
            require_capability(request, self._owner._claimed)
            channel.put(ProgressEvent("preparing"))
            pieces = self._owner._pieces or answer(request.messages)
            if request.json_schema is not None:
                pieces = document(request.json_schema)
            for medium in request.media:
                _read(medium, policy)
                channel.check()
            words = sum(len(p.split()) for m in request.messages for p in m.parts if type(p) is str)
            prompt = words + 196 * len(request.media)
            if prompt >= INFO.context:
                raise PluginError(
                    "context_overflow",
                    f"the prompt has {prompt} tokens, but the context holds {INFO.context}",
                    "use fewer media or a shorter text",
                )
            channel.put(ProgressEvent("answering"))
            stop, likely = StopStrings(request.stop), Likelihoods(request.logprobs)
            text, count = "", 0
            finish: FinishReason = "stop"

            def say(piece: str) -> str:
                if piece:
                    channel.put(TextEvent(piece, logprobs=likely.show(piece)))
                return piece

            max_tokens = request.max_tokens or min(256, self._owner.limits.max_tokens)
            for place, piece in enumerate(pieces):
                if place == max_tokens:
                    finish = "length"
                    break
                self._owner._step(place, channel)
                count += 1
                likely.add(piece)
                text += say(stop.add(piece))
                if stop.found is not None:
                    break
            text += say(stop.finish())
            usage = Usage(
                prompt_tokens=prompt, media_tokens=196 * len(request.media), completion_tokens=count
            )
            return GenerateResult(text, finish, usage, logprobs=likely.told)

        def embed(
            self, request: EmbedRequest, policy: MediaPolicy, channel: Channel
        ) -> EmbedResult:
            require_capability(request, self._owner._claimed)
            vectors = []
            for place, item in enumerate(request.items):
                channel.put(ProgressEvent("embedding", place, len(request.items)))
                self._owner._step(place, channel)
                media = item.media if isinstance(item, Group) else [item]
                try:
                    parts = [m.encode() if isinstance(m, str) else _read(m, policy) for m in media]
                except PluginError as error:
                    raise error.of(f"item {place + 1}") from None
                vectors.append(vector(b"\0".join(parts), request.normalize))
            return EmbedResult(
                vectors=tuple(vectors),
                space=request.space,
                dim=DIM,
                model=INFO.id,
                revision=INFO.revision,
                method="hash",
                normalized=request.normalize,
            )

        def describe_video(
            self, request: DescribeRequest, policy: MediaPolicy, channel: Channel
        ) -> DescribeResult:
            require_capability(request, self._owner._claimed)
            channel.put(ProgressEvent("preparing"))
            _read(request.video, policy)
            first, last = request.start or 0.0, min(request.end or SECONDS, SECONDS)
            if first >= last:
                raise PluginError("bad_request", f"start is {first:g} s, behind the video's end")
            window = request.segments if request.segments != "scenes" else 10.0
            if (last - first) / window > MOST_SEGMENTS:
                raise PluginError(
                    "bad_request",
                    f"{last - first:g} s in segments of {window:g} s are more than "
                    f"{MOST_SEGMENTS} segments",
                    "use longer ones",
                )
            segments: list[Segment] = []
            count = math.ceil((last - first) / window)
            for place in range(count):
                self._owner._step(place, channel)
                begin = first + place * window
                text = f"This is part {place + 1}."
                channel.put(TextEvent(text, segment=place))
                segments.append(Segment(place, begin, min(begin + window, last), text, (begin,)))
                channel.put(SegmentEvent(segments[-1]))
                channel.put(ProgressEvent("describing", place + 1, count))
            return DescribeResult(
                duration=SECONDS,
                segments=tuple(segments),
                summary=f"A video of {count} parts.",
                chapters=(Chapter(first, "All of it"),),
            )

        def close(self) -> None:
            """Nothing is held."""


def _read(medium: Media, policy: MediaPolicy) -> bytes:
    source = policy.open(medium)
    data = source if isinstance(source, bytes) else _whole(source)
    if sniff(data) != medium.kind:
        raise PluginError(
            "unsupported_media",
            f"the {medium.kind} given as {_given(medium)} is no {medium.kind}",
            "send a picture or a video in a usual format",
        )
    return data


def _whole(file: BinaryIO) -> bytes:
    with file:
        return file.read()


def _given(medium: Media) -> str:
    return "bytes" if medium.data is not None else "a path" if medium.path is not None else "a URL"
