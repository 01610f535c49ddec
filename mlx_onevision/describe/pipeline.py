"""A film's segments found, shown to a model and told, one after another; titles and a summary last.

Two things go on at once: the model tells one segment while the next one's frames are decoded. No
more than these two are in memory, however long the film is.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.describe.formats import Chapter, Segment, VideoDescription, clock
from mlx_onevision.describe.journal import Sidecar
from mlx_onevision.describe.options import Plan
from mlx_onevision.describe.outline import SEGMENT, Outline, chapter_firsts
from mlx_onevision.describe.scenes import Span, cuts
from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.generation import Stream, submit
from mlx_onevision.engine.request import PromptRequest
from mlx_onevision.errors import CancelledError, ContextOverflowError, MediaError
from mlx_onevision.media.anyres import video_tokens
from mlx_onevision.media.decoder import VideoReader
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.resize import resize
from mlx_onevision.prompt.processor import Processor

# A model that tells what a film shows: asked about frames, or about captions alone.

LONGEST_READING = 8192
"""Tokens of captions that are read at once, even where more would fit: that bounds memory."""

Tiles = NDArray[np.uint8]


Prepare = Callable[..., PromptRequest]
"""Makes a question of a prompt, ``videos`` and settings by their names."""


class Captioner:
    """Asks a loaded model, one question at a time, and keeps no frames of what it was asked about:
    a film does not come back to them.

    settings : of every answer, by the names in :class:`~mlx_onevision.engine.options.Options`.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        prepare: Prepare,
        settings: Mapping[str, Any],
    ) -> None:
        self._engine, self._processor = engine, processor
        self._prepare, self._settings = prepare, settings
        self.size = processor.video_config.pixels.size
        """Pixels along a side of a tile."""

    def ask(self, question: str, max_tokens: int, tiles: Tiles | None = None) -> Stream:
        """Starts an answer; about frames, where there are ``tiles`` of them (n, size, size, 3).

        Raises:
            RequestError: for a setting out of range.
            ContextOverflowError: for more than the model's context holds.
        """
        prepared = self._question(question, max_tokens, tiles)
        stream = submit(self._engine, self._processor.tokenizer, prepared)
        if tiles is not None:
            self._engine.forget(prepared.inputs)  # once the answer is there
        return stream

    def check(self, question: str, max_tokens: int, num_frames: int) -> None:
        """Raises what asking about so many frames would raise."""
        length = len(self._question(question, max_tokens, None).inputs.input_ids)
        patches = self._engine.config.vision_config.patches_per_side
        length += video_tokens(num_frames, patches)
        limit = self._engine.config.text_config.max_position_embeddings
        if length >= limit:
            raise ContextOverflowError(
                f"{num_frames} frames of a segment take {length} tokens with the question, but the "
                f"model's context holds {limit}; use fewer frames"
            )

    def fits(self, question: str, max_tokens: int) -> bool:
        """Whether a question about words can be read at once, and answered."""
        length = len(self._question(question, max_tokens, None).inputs.input_ids)
        limit = self._engine.config.text_config.max_position_embeddings
        return length + max_tokens <= min(limit, LONGEST_READING)

    def _question(self, question: str, max_tokens: int, tiles: Tiles | None) -> PromptRequest:
        videos = [] if tiles is None else [tiles]
        return self._prepare(question, videos=videos, max_tokens=max_tokens, **self._settings)


Stage = Literal["probe", "decode", "encode", "text"]
POLL_SECONDS = 0.25  # between two reports on the search for scenes


@dataclass(frozen=True)
class Progress:
    """How far a description is.

    ``probe`` counts seconds of the film in which scenes have been looked for; ``decode``,
    ``encode`` and ``text`` count segments, and ``text`` the titles and the summary after them.
    """

    stage: Stage
    done: float
    total: float


@dataclass(frozen=True)
class Shown:
    """What of a segment the model sees: n frames (n, S, S, 3), and when each appears."""

    tiles: Tiles
    times: tuple[float, ...]
    warnings: tuple[str, ...]


class Telling:
    """One run over a film. What is done goes to the sidecar at once; what is there is not done
    again.

    pool : one thread, on which the film is decoded.
    check : raises when it is to end.
    """

    def __init__(
        self,
        narrator: Captioner,
        plan: Plan,
        reel: VideoReader,
        done: Sidecar,
        pool: ThreadPoolExecutor,
        check: Callable[[], None],
    ) -> None:
        self._narrator, self._plan, self._reel, self._done = narrator, plan, reel, done
        self._pool, self._check = pool, check

    def run(
        self, watch: Callable[[Stream], Stream]
    ) -> Generator[Progress | Segment, None, VideoDescription]:
        """Yields what happens, and returns the description, in which no model is named yet.

        watch : is given each answer as it begins.
        """
        self._watch = watch
        spans = self._done.spans
        if spans is None:
            spans = yield from self._search()
            self._done.add_spans(spans)
        facts = self._reel.info
        warnings: list[str] = []
        if facts.total < facts.claimed:
            there = f"{facts.total} of its {facts.claimed} frames are there"
            warnings.append(f"the video breaks off: {there}")
        titles = len(chapter_firsts(spans))
        segments = yield from self._tell(spans, len(spans) + titles + 1, warnings)
        chapters: list[Chapter] = []
        summary = ""
        outline = Outline(self._answered, self._narrator.fits)
        try:
            for chapter in outline.chapters(segments):
                chapters.append(chapter)
                yield Progress("text", len(spans) + len(chapters), len(spans) + titles + 1)
            summary = outline.summary(segments)
        except ContextOverflowError as error:
            warnings.append(f"chapters and summary are incomplete: {error}")
        yield Progress("text", len(spans) + titles + 1, len(spans) + titles + 1)
        return VideoDescription(
            source=self._reel.name,
            duration=facts.length,
            model="",
            segments=tuple(segments),
            summary=summary,
            chapters=tuple(chapters),
            warnings=tuple(warnings),
        )

    def _search(self) -> Generator[Progress, None, list[Span]]:
        """Where the segments are."""
        start, end = self._plan.part(self._reel.info.length)
        if self._plan.segments != "scenes":
            return self._plan.spans(start, end, [])
        seen = start

        def look() -> list[float]:
            def note(time: float) -> None:
                nonlocal seen
                seen = time
                self._check()

            film = self._reel.thumbnails(start, end)
            return list(cuts(film, start, end, self._plan.finder, note))

        search = self._pool.submit(look)
        while not search.done():
            yield Progress("probe", seen - start, end - start)
            wait([search], POLL_SECONDS)
        spans = self._plan.spans(start, end, search.result())
        yield Progress("probe", end - start, end - start)
        return spans

    def _tell(
        self, spans: Sequence[Span], total: int, warnings: list[str]
    ) -> Generator[Progress | Segment, None, list[Segment]]:
        """Every segment, from the sidecar or told now."""
        waiting = [number for number in range(len(spans)) if number not in self._done.segments]
        ahead: Future[Shown | MediaError] | None = None
        failure: MediaError | None = None
        segments: list[Segment] = []
        for number, span in enumerate(spans):
            if number in self._done.segments:
                segment, said = self._done.segments[number]
            else:
                shown = (ahead or self._pool.submit(self._show, span)).result()
                yield Progress("decode", number + 1, len(spans))
                waiting.pop(0)
                ahead = self._pool.submit(self._show, spans[waiting[0]]) if waiting else None
                if isinstance(shown, Shown):
                    text = yield from self._caption(shown, number + 1, len(spans))
                    segment, said = Segment(*span, text, shown.times), list(shown.warnings)
                    self._done.add_segment(number, segment, said)
                else:  # not kept, so that the next run tries again
                    failure = failure or shown
                    segment = Segment(*span, "")
                    said = [f"nothing is told of {clock(span[0])} to {clock(span[1])}: {shown}"]
            segments.append(segment)
            warnings += said
            yield Progress("text", number + 1, total)
            yield segment
        if failure is not None and not any(segment.frames for segment in segments):
            raise failure
        return segments

    def _show(self, span: Span) -> Shown | MediaError:
        """The frames of a segment, on the thread that decodes."""
        size = self._narrator.size
        try:
            look = self._reel.read_frames(
                FrameOptions(self._plan.num_frames, start=span[0], end=span[1])
            )
            tiles = np.empty((len(look.indices), size, size, 3), np.uint8)
            times: list[float] = []
            for place, pixels in look.frames:
                self._check()
                tiles[len(times)] = resize(np.ascontiguousarray(pixels), (size, size))
                # A frame that is on screen as the segment begins may have come before.
                times.append(max(look.times[place], span[0]))
        except MediaError as error:
            return error
        lost = len(look.indices) - len(times)
        if not times:
            return MediaError(f"cannot read {self._reel.name}: no frame of it can be decoded")
        warnings = ()
        if lost:
            part = f"{clock(span[0])} to {clock(span[1])}"
            warnings = (f"{lost} of {len(look.indices)} frames of {part} cannot be decoded",)
        return Shown(tiles[: len(times)], tuple(times), warnings)

    def _caption(self, shown: Shown, number: int, total: int) -> Generator[Progress, None, str]:
        answer = self._watch(self._narrator.ask(SEGMENT, self._plan.max_tokens, shown.tiles))
        encoded = False
        for _ in answer:
            if not encoded:
                encoded = True
                yield Progress("encode", number, total)
        return _whole(answer)

    def _answered(self, question: str, max_tokens: int) -> str:
        """A question about words, asked once."""
        known = self._done.answers.get(question)
        if known is None:
            known = _whole(self._watch(self._narrator.ask(question, max_tokens)))
            self._done.add_answer(question, known)
        return known


def _whole(answer: Stream) -> str:
    """An answer to its end."""
    result = answer.result()
    if result.finish_reason == "cancelled":
        raise CancelledError("the description was cancelled")
    return result.text.strip()
