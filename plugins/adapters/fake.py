"""A backend without weights, for the tests of a host: it answers at once and always the same, or
slowly, or fails where it is told to. Queue, limits, media policy, cancellation and errors are the
real ones; standard library only.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import BinaryIO

from mlx_onevision.plugins.adapters.invented import DIM, Likelihoods, answer, vector
from mlx_onevision.plugins.adapters.samples import document
from mlx_onevision.plugins.contract.claims import refuse_unclaimed
from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.events import ProgressEvent, SegmentEvent, TextEvent
from mlx_onevision.plugins.contract.media import Media, sniff
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Group,
)
from mlx_onevision.plugins.contract.results import (
    Capability,
    Chapter,
    DescribeResult,
    EmbedResult,
    FinishReason,
    GenerateResult,
    ModelInfo,
    Segment,
    Space,
    Usage,
)
from mlx_onevision.plugins.contract.streams import Channel
from mlx_onevision.plugins.service.media_policy import MediaPolicy
from mlx_onevision.plugins.service.service import DEAD, Limits, Service
from mlx_onevision.sampling.detokenizer import StopStrings

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
            refuse_unclaimed(request, self._owner._claimed)
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

            for place, piece in enumerate(pieces):
                if place == request.max_tokens:
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
            refuse_unclaimed(request, self._owner._claimed)
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
            refuse_unclaimed(request, self._owner._claimed)
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
