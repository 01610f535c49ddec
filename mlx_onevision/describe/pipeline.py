"""A description: finds scenes, has a model caption the frames of each, then titles and a summary.

Two things go on at once: the model captions one segment while the next one's frames are decoded. No
more than these two are in memory, however long the video is.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.describe.formats import Chapter, Segment, VideoDescription, clock
from mlx_onevision.describe.journal import Journal
from mlx_onevision.describe.options import DescribeSettings
from mlx_onevision.describe.outline import SEGMENT, Outline, chapter_firsts
from mlx_onevision.describe.scenes import Span, cuts
from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.generation import Stream, submit
from mlx_onevision.engine.request import PromptRequest
from mlx_onevision.errors import CancelledError, ContextOverflowError, MediaError
from mlx_onevision.media.anyres import VideoPacking
from mlx_onevision.media.decoder import VideoReader
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.resize import resize
from mlx_onevision.prompt.processor import Processor

LONGEST_PROMPT = 8192
"""Tokens of captions that are read at once, even where more would fit: that bounds memory."""
POLL_SECONDS = 0.25  # between two reports on the search for scenes

Tiles = NDArray[np.uint8]
Stage = Literal["probe", "decode", "encode", "text"]


@dataclass(frozen=True)
class Progress:
    """How far a description is.

    ``probe`` counts seconds of the video in which scenes have been searched; ``decode``, ``encode``
    and ``text`` count segments, and ``text`` the titles and the summary after them.
    """

    stage: Stage
    done: float
    total: float


class Captioner:
    """Prompts a loaded model, about frames or captions, and keeps no frames of what it was asked
    about: they do not come again.

    prepare : makes a request of a prompt, ``videos`` and settings by their names.
    settings : of all generated text, by the names in
        :class:`~mlx_onevision.engine.options.Options`.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        prepare: Callable[..., PromptRequest],
        settings: Mapping[str, Any],
    ) -> None:
        self._engine, self._processor = engine, processor
        self._prepare, self._settings = prepare, settings
        self.size = processor.video_config.pixels.size
        """Pixels along a side of a tile."""
        self.decoding = processor.decoding

    def ask(self, prompt: str, max_tokens: int, tiles: Tiles | None = None) -> Stream:
        """Starts an answer; about frames, where there are ``tiles`` of them (n, size, size, 3).

        Raises:
            RequestError: for a setting out of range.
            ContextOverflowError: for more than the model's context holds.
        """
        request = self._request(prompt, max_tokens, tiles)
        stream = submit(self._engine, self._processor.tokenizer, request)
        if tiles is not None:
            self._engine.forget(request.inputs)  # once the answer is there
        return stream

    def check(self, prompt: str, max_tokens: int, num_frames: int) -> None:
        """Raises what asking about so many frames would raise."""
        length = len(self._request(prompt, max_tokens).inputs.input_ids)
        length += VideoPacking.of(self._engine.config).tokens(num_frames)
        limit = self._engine.context
        if length >= limit:
            raise ContextOverflowError(
                f"{num_frames} frames of a segment take {length} tokens with the question, but "
                f"{limit} fit into the context and into memory; use fewer frames"
            )

    def fits(self, prompt: str, max_tokens: int) -> bool:
        """Whether a prompt of text can be read at once, and answered."""
        length = len(self._request(prompt, max_tokens).inputs.input_ids)
        limit = self._engine.context
        return length + max_tokens <= min(limit, LONGEST_PROMPT)

    def _request(self, prompt: str, max_tokens: int, tiles: Tiles | None = None) -> PromptRequest:
        videos = [] if tiles is None else [tiles]
        return self._prepare(prompt, videos=videos, max_tokens=max_tokens, **self._settings)


@dataclass(frozen=True)
class SegmentFrames:
    """What of a segment the model sees: n frames (n, S, S, 3), and when each appears."""

    tiles: Tiles
    times: tuple[float, ...]
    warnings: tuple[str, ...]


class DescribePipeline:
    """One run over a video. What is done goes to the journal at once; what is there is not done
    again.

    pool : one thread, on which the video is decoded.
    check : raises when it is to end.
    watch : is given each answer as it begins.
    """

    def __init__(
        self,
        captioner: Captioner,
        settings: DescribeSettings,
        video: VideoReader,
        journal: Journal,
        pool: ThreadPoolExecutor,
        check: Callable[[], None],
        watch: Callable[[Stream], Stream],
    ) -> None:
        self._captioner, self._settings = captioner, settings
        self._video, self._journal, self._pool = video, journal, pool
        self._check, self._watch = check, watch

    def run(self) -> Generator[Progress | Segment, None, VideoDescription]:
        """Yields what happens, and returns the description, in which no model is named yet."""
        spans = self._journal.spans
        if spans is None:
            spans = yield from self._find_scenes()
            self._journal.add_spans(spans)
        info = self._video.info
        warnings: list[str] = []
        if info.total < info.claimed:
            there = f"{info.total} of its {info.claimed} frames are there"
            warnings.append(f"the video breaks off: {there}")
        total = len(spans) + len(chapter_firsts(spans)) + 1
        segments = yield from self._caption_all(spans, total, warnings)
        chapters: list[Chapter] = []
        summary = ""
        outline = Outline(self._ask_once, self._captioner.fits)
        try:
            for chapter in outline.chapters(segments):
                chapters.append(chapter)
                yield Progress("text", len(spans) + len(chapters), total)
            summary = outline.summary(segments)
        except ContextOverflowError as error:
            warnings.append(f"chapters and summary are incomplete: {error}")
        yield Progress("text", total, total)
        return VideoDescription(
            source=self._video.name,
            duration=info.length,
            model="",
            segments=tuple(segments),
            summary=summary,
            chapters=tuple(chapters),
            warnings=tuple(warnings),
        )

    def _find_scenes(self) -> Generator[Progress, None, list[Span]]:
        start, end = self._settings.part(self._video.info.length)
        if self._settings.segments != "scenes":
            return self._settings.spans(start, end, [])
        reached = start

        def search() -> list[float]:
            def note(time: float) -> None:
                nonlocal reached
                reached = time
                self._check()

            frames = self._video.thumbnails(start, end)
            return list(cuts(frames, start, end, self._settings.finder, note))

        found = self._pool.submit(search)
        while not found.done():
            yield Progress("probe", reached - start, end - start)
            wait([found], POLL_SECONDS)
        spans = self._settings.spans(start, end, found.result())
        yield Progress("probe", end - start, end - start)
        return spans

    def _caption_all(
        self, spans: Sequence[Span], total: int, warnings: list[str]
    ) -> Generator[Progress | Segment, None, list[Segment]]:
        """Every segment, from the journal or captioned now."""
        waiting = [number for number in range(len(spans)) if number not in self._journal.segments]
        ahead: Future[SegmentFrames | MediaError] | None = None
        failure: MediaError | None = None
        segments: list[Segment] = []
        for number, span in enumerate(spans):
            if number in self._journal.segments:
                segment, notes = self._journal.segments[number]
            else:
                frames = (ahead or self._pool.submit(self._read, span)).result()
                yield Progress("decode", number + 1, len(spans))
                waiting.pop(0)
                ahead = self._pool.submit(self._read, spans[waiting[0]]) if waiting else None
                if isinstance(frames, SegmentFrames):
                    text = yield from self._caption(frames, number + 1, len(spans))
                    segment, notes = Segment(*span, text, frames.times), list(frames.warnings)
                    if not text:
                        part = f"{clock(span[0])} to {clock(span[1])}"
                        notes.append(f"{part} is not described: the model's answer was empty")
                    self._journal.add_segment(number, segment, notes)
                else:  # not kept, so that the next run tries again
                    failure = failure or frames
                    segment = Segment(*span, "")
                    notes = [f"{clock(span[0])} to {clock(span[1])} is not described: {frames}"]
            segments.append(segment)
            warnings += notes
            yield Progress("text", number + 1, total)
            yield segment
        if failure is not None and not any(segment.frames for segment in segments):
            raise failure
        return segments

    def _read(self, span: Span) -> SegmentFrames | MediaError:
        """The frames of a segment, on the thread that decodes."""
        size, count = self._captioner.size, self._settings.num_frames
        try:
            chosen = self._video.read_frames(FrameOptions(count, start=span[0], end=span[1]))
            tiles = np.empty((len(chosen.indices), size, size, 3), np.uint8)
            times: list[float] = []
            for place, pixels in chosen.frames:
                self._check()
                tiles[len(times)] = resize(np.ascontiguousarray(pixels), (size, size))
                # A frame that is on screen as the segment begins may have come before.
                times.append(max(chosen.times[place], span[0]))
        except MediaError as error:
            return error
        lost = len(chosen.indices) - len(times)
        if not times:
            return MediaError(f"cannot read {self._video.name}: no frame of it can be decoded")
        warnings = ()
        if lost:
            part = f"{clock(span[0])} to {clock(span[1])}"
            warnings = (f"{lost} of {len(chosen.indices)} frames of {part} cannot be decoded",)
        return SegmentFrames(tiles[: len(times)], tuple(times), warnings)

    def _caption(
        self, frames: SegmentFrames, number: int, total: int
    ) -> Generator[Progress, None, str]:
        answer = self._watch(self._captioner.ask(SEGMENT, self._settings.max_tokens, frames.tiles))
        if next(answer, None) is not None:  # the frames are encoded
            yield Progress("encode", number, total)
        return _text(answer)

    def _ask_once(self, prompt: str, max_tokens: int) -> str:
        """The answer to a prompt of text, from the journal or generated now."""
        known = self._journal.answers.get(prompt)
        if known is None:
            known = _text(self._watch(self._captioner.ask(prompt, max_tokens)))
            self._journal.add_answer(prompt, known)
        return known


def _text(answer: Stream) -> str:
    result = answer.result()
    if result.finish_reason == "cancelled":
        raise CancelledError("the description was cancelled")
    return result.text.strip()
