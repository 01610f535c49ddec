"""A video described: an iterator of what happens, and the whole description at its end."""

import json
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from hashlib import blake2b
from os import PathLike, fspath
from pathlib import Path
from threading import Event
from typing import Any, TypeAlias

from mlx_onevision.describe.formats import Segment, VideoDescription
from mlx_onevision.describe.journal import VERSION, Journal, fingerprint
from mlx_onevision.describe.options import DescribeSettings
from mlx_onevision.describe.outline import SEGMENT
from mlx_onevision.describe.pipeline import Captioner, DescribePipeline, Progress
from mlx_onevision.engine.generation import Stream
from mlx_onevision.errors import CancelledError, OneVisionError, RequestError
from mlx_onevision.media.decoder import VideoReader
from mlx_onevision.media.video import VideoSource, is_file, open_video_file

LONGEST_NAME = 4096

DescriptionEvent: TypeAlias = Progress | Segment | VideoDescription


class DescriptionStream:
    """A description on its way: an iterator of progress, of each segment as it is described (those
    too that an earlier run has described), and at last of the whole description.

    An abandoned stream cancels itself; as a context manager it does so at once. What is done by
    then is in the sidecar.

    video : a path, a URL or bytes.
    captioner : prompts the loaded model. model : its name.
    settings : which segments, how many frames of each; see :class:`DescribeOptions`.
    about : what a description depends on besides the video, plain values.
    sidecar, force : the file of a ``Journal``, and whether to start it over; in a folder, the file
        has a name of its own for each video, model and settings.

    Raises, the last two as it is iterated:
        RequestError: for frames without a clock, settings out of range, and another's sidecar.
        MediaError: for a video that cannot be read, or none of whose segments can.
        ContextOverflowError: for more frames than the model's context holds.
    """

    def __init__(
        self,
        video: VideoSource,
        captioner: Captioner,
        settings: DescribeSettings,
        model: str,
        about: dict[str, Any],
        sidecar: Path | None = None,
        force: bool = False,
    ) -> None:
        if not is_file(video):
            raise RequestError(
                "frames that are given one by one have no clock, so they cannot be described by "
                "time; give a video file, or ask about them with generate"
            )
        self._video, self._captioner, self._settings = video, captioner, settings
        self._model = model
        self._about, self._sidecar, self._force = about, sidecar, force
        self._cancelled = Event()
        self._answer: Stream | None = None
        self._result: VideoDescription | None = None
        self._error: OneVisionError | None = None
        self._events = self._run()

    def __iter__(self) -> Iterator[DescriptionEvent]:
        return self

    def __next__(self) -> DescriptionEvent:
        return next(self._events)

    def cancel(self) -> None:
        """Ends it before the next frame or token; iteration then ends, from any thread."""
        self._cancelled.set()
        if self._answer is not None:
            self._answer.cancel()

    def close(self) -> None:
        """Cancels it and lets go of the video and the sidecar; on the thread that iterates."""
        self.cancel()
        self._events.close()

    def __enter__(self) -> "DescriptionStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def result(self) -> VideoDescription:
        """The whole description, waited for.

        Raises:
            CancelledError: when it was cancelled.
            RequestError: where an error of another kind has ended its iteration before.
            OneVisionError: what ended it otherwise.
        """
        for _ in self._events:
            pass
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RequestError("the description failed while it was streamed; ask again")
        return self._result

    def _run(self) -> Generator[DescriptionEvent, None, None]:
        try:
            yield from self._described()
        except CancelledError as error:
            self._error = error
        except OneVisionError as error:
            self._error = error
            raise
        finally:
            self.cancel()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise CancelledError("the description was cancelled")

    def _described(self) -> Iterator[DescriptionEvent]:
        settings = self._settings
        self._captioner.check(SEGMENT, settings.max_tokens, settings.num_frames)
        self._check()
        file, name = open_video_file(self._video)
        with file, ExitStack() as stack:
            about = {"video": fingerprint(file), **self._about}
            path = self._sidecar
            if path is not None and path.is_dir():
                # A file name that no other description has.
                text = json.dumps([VERSION, about], sort_keys=True)
                path /= blake2b(text.encode(), digest_size=16).hexdigest() + ".jsonl"
            journal = stack.enter_context(Journal(path, about, self._force))
            described = journal.description
            if described is None:
                reader = stack.enter_context(
                    VideoReader(file, name, self._captioner.decoding, self._check)
                )
                pool = stack.enter_context(ThreadPoolExecutor(1, "mlx-onevision-frames"))
                stack.callback(self._cancelled.set)  # nothing is waited for that nobody wants
                pipeline = DescribePipeline(
                    self._captioner, settings, reader, journal, pool, self._check, self._watch
                )
                described = yield from pipeline.run()
                described = replace(described, model=self._model, source=name)
                journal.finish(described)
            else:
                yield from described.segments
        self._result = replace(described, source=_source(self._video, name))
        yield self._result

    def _watch(self, answer: Stream) -> Stream:
        self._answer = answer
        if self._cancelled.is_set():
            answer.cancel()
        return answer


def _source(video: VideoSource, name: str) -> str:
    """A path or an address as it was given."""
    if isinstance(video, str | PathLike):
        given = str(fspath(video))
        if len(given) <= LONGEST_NAME and given[:5].lower() != "data:":
            return given
    return name
