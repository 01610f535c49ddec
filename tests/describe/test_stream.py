"""Videos described: the scenes, their words, what is resumed, cancelled and broken, and memory."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pysubs2
import pytest
from checkpoints import write
from videos import encode_video, numbered, written

from examples.demo_model.drawing import draw_scene
from examples.demo_model.scenes import sample_video
from mlx_onevision.api import Model, load
from mlx_onevision.describe import pipeline
from mlx_onevision.describe.formats import Segment, VideoDescription
from mlx_onevision.describe.formats import write as to_text
from mlx_onevision.describe.outline import SEGMENT
from mlx_onevision.describe.pipeline import Captioner, Progress
from mlx_onevision.describe.stream import DescriptionStream
from mlx_onevision.errors import (
    CancelledError,
    ContextOverflowError,
    MediaError,
    OneVisionError,
    RequestError,
)
from mlx_onevision.media.frame_sampling import FrameOptions
from mlx_onevision.media.video import load_video

RATE = 12
LENGTHS = (40, 33, 47)  # frames of the three scenes
CUTS = (40 / RATE, 73 / RATE)


@pytest.fixture(scope="module")
def demo() -> Iterator[Model]:
    model = load("demo")
    yield model
    model.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model", tied=False)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[Model]:
    model = load(tiny)
    yield model
    model.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Three scenes with hard cuts, of a shape that moves each, and the names of these."""
    frames: list[np.ndarray] = []
    names: list[str] = []
    for number, length in enumerate(LENGTHS):
        rng = Random(f"three {number}")
        scene = sample_video(rng, (120, 160), 1)
        names.append(scene.shapes[0].name)
        frames += [
            np.asarray(draw_scene(scene, rng, n / (length - 1), smooth=True)) for n in range(length)
        ]
    assert len(set(names)) == 3
    path = tmp_path_factory.mktemp("videos") / "three.mp4"
    return written(path, encode_video(frames, rate=RATE)), names


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds at 12 frames a second, with key frames often."""
    frames = (numbered(n) for n in range(120))
    data = encode_video(frames, rate=RATE, options={"g": "6", "bf": "0"})
    return written(tmp_path_factory.mktemp("videos") / "clip.mp4", data)


class Asked:
    """Counts what a model is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames: list[np.ndarray] = []
        self.words = 0
        ask = Captioner.ask

        def counted(captioner: Captioner, question: str, tokens: int, tiles: Any = None) -> Any:
            if tiles is None:
                self.words += 1
            else:
                self.frames.append(tiles)
            return ask(captioner, question, tokens, tiles)

        monkeypatch.setattr(Captioner, "ask", counted)


# A video of three scenes.


def test_three_scenes_are_found_and_described(demo: Model, three: tuple[Path, list[str]]) -> None:
    path, names = three
    described = demo.describe_video(path)
    assert (described.source, described.model) == (str(path), "demo")
    assert described.duration == pytest.approx(sum(LENGTHS) / RATE)
    assert [s.start for s in described.segments] == pytest.approx([0.0, *CUTS], abs=1 / RATE)
    assert [s.end for s in described.segments] == [*(s.start for s in described.segments[1:]), 10.0]
    does = ("gets bigger", "gets smaller", "moves down")
    texts = [f"{name} {what}" for name, what in zip(names, does, strict=True)]
    assert [s.text for s in described.segments] == [f"A {clause}." for clause in texts]
    for segment in described.segments:
        assert len(segment.frames) == 8
        assert segment.start <= segment.frames[0] and segment.frames[-1] < segment.end
    assert [chapter.start for chapter in described.chapters] == [0.0, *CUTS]
    assert [chapter.title.lower() for chapter in described.chapters] == [
        f"{name} {doing}"
        for name, doing in zip(
            names, ("getting bigger", "getting smaller", "moving down"), strict=True
        )
    ]
    assert described.summary == "A {}, then a {}, then a {}.".format(*texts)
    assert not described.warnings
    subtitles = pysubs2.SSAFile.from_string(to_text(described, "srt"), "srt")
    assert [(line.start, line.end, line.text) for line in subtitles] == [
        (round(s.start * 1000), round(s.end * 1000), s.text) for s in described.segments
    ]


def test_what_happens_is_told_as_it_happens(demo: Model, three: tuple[Path, list[str]]) -> None:
    events = list(demo.stream_description(three[0], max_tokens=24))
    segments = [event for event in events if isinstance(event, Segment)]
    assert isinstance(events[-1], VideoDescription) and list(events[-1].segments) == segments
    progress = [event for event in events if isinstance(event, Progress)]
    stages = [event.stage for event in progress if event.stage != "probe"]
    assert stages == ["decode", "encode", "text"] * 3 + ["text"] * 4
    for stage, total in (("probe", 10.0), ("decode", 3), ("encode", 3), ("text", 7)):
        done = [event.done for event in progress if event.stage == stage]
        assert done == sorted(done) and done[-1] == total
        assert {event.total for event in progress if event.stage == stage} == {total}
    assert events.index(segments[0]) < events.index(segments[1]) - 3  # not all at the end


def test_it_is_told_from_its_own_frames(
    model: Model, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    described = model.describe_video(clip, segments=3.0, num_frames=4, max_tokens=4, start=0.5)
    spans = [(0.5, 3.5), (3.5, 6.5), (6.5, 10.0)]
    assert [(s.start, s.end) for s in described.segments] == spans
    for segment, tiles in zip(described.segments, asked.frames, strict=True):
        part = FrameOptions(num_frames=4, start=segment.start, end=segment.end)
        expected = load_video(clip, tiles.shape[1], part)
        np.testing.assert_array_equal(tiles, expected.tiles)
        assert segment.frames == expected.times
        answer = model.generate(SEGMENT, videos=[expected.tiles], max_tokens=4)
        assert segment.text == answer.text.strip()


def test_a_long_scene_is_divided(model: Model, tmp_path: Path) -> None:
    still = [numbered(0)] * 120
    data = encode_video(still, rate=RATE, options={"g": "6", "bf": "0"})
    clip = written(tmp_path / "clip.mp4", data)
    short = model.describe_video(clip, longest=4, num_frames=1, max_tokens=2)
    assert [s.end for s in short.segments] == pytest.approx([10 / 3, 20 / 3, 10.0])


# What goes on where it was stopped.


def test_what_is_done_is_not_done_again(
    model: Model, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"segments": 1.0, "num_frames": 2, "max_tokens": 4}
    whole = model.describe_video(clip, **options)
    asked = Asked(monkeypatch)
    path = tmp_path / "a.jsonl"
    assert model.describe_video(clip, **options, sidecar=path) == whole
    lines = path.read_bytes().splitlines(keepends=True)
    assert (len(asked.frames), asked.words) == (10, len(lines) - 13)
    for kept in (1, 6, 12, len(lines) - 1, len(lines)):
        asked.frames, asked.words = [], 0
        path.write_bytes(b"".join(lines[:kept]) + b'{"type": "segm' * (kept < len(lines)))
        events = list(model.stream_description(clip, **options, sidecar=path))
        assert events[-1] == whole
        assert [e for e in events if isinstance(e, Segment)] == list(whole.segments)
        assert len(asked.frames) == min(max(12 - kept, 0), 10)
        assert asked.words == min(max(len(lines) - 1 - kept, 0), len(lines) - 13)
        assert path.read_bytes() == b"".join(lines)
    asked.frames = []
    assert model.describe_video(clip, **options, sidecar=path, force=True) == whole
    assert len(asked.frames) == 10
    with pytest.raises(RequestError, match="other settings"):
        model.describe_video(clip, segments=2.0, sidecar=path)


def test_in_a_folder_each_has_a_file_of_its_own(
    model: Model, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    options: dict[str, Any] = {"segments": 5.0, "num_frames": 1, "sidecar": tmp_path}
    first = model.describe_video(clip, **options, max_tokens=2)
    model.describe_video(clip, **options, max_tokens=3)
    assert len(list(tmp_path.iterdir())) == 2 and len(asked.frames) == 4
    moved = model.describe_video(clip.read_bytes(), **options, max_tokens=2)
    assert len(asked.frames) == 4
    assert moved.source == "the video given as bytes" and moved.segments == first.segments


PROGRAM = """
import sys
from mlx_onevision import load
model = load(sys.argv[1])
model.describe_video(sys.argv[2], sidecar=sys.argv[3], segments=0.25, num_frames=2, max_tokens=4)
"""


def test_killed_at_any_moment_it_ends_up_the_same(
    tiny: Path, model: Model, clip: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"segments": 0.25, "num_frames": 2, "max_tokens": 4}
    path = tmp_path / "a.jsonl"
    rng = random.Random(7)
    for least in (1, 20):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, tiny, clip, path])
        try:
            end = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < end:
                if path.exists() and path.read_bytes().count(b"\n") > 2 + least:
                    break
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = path.read_bytes().count(b'"type": "segment"')
    assert done > 20
    described = model.describe_video(clip, sidecar=path, **options)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    captioned = [row["index"] for row in rows if row["type"] == "segment"]
    assert captioned == list(range(40))  # each once
    assert described == model.describe_video(clip, **options)


# What ends it, and what does not.


def test_it_ends_between_frames_and_tokens(model: Model, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    stream = model.stream_description(clip, segments=1.0, max_tokens=4, sidecar=path)
    for event in stream:
        if isinstance(event, Segment):
            stream.cancel()
    with pytest.raises(CancelledError):
        stream.result()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["type"] for row in rows] == ["describes", "scenes", "segment"]
    model.describe_video(clip, segments=1.0, max_tokens=4, sidecar=path)  # it is free again


def test_it_ends_while_scenes_are_looked_for_and_words_are_made(model: Model, clip: Path) -> None:
    def ended(stage: str, **options: Any) -> float:
        stream: DescriptionStream = model.stream_description(clip, **options)
        timer, started = None, 0.0
        for event in stream:
            if isinstance(event, Progress) and event.stage == stage and timer is None:
                timer = threading.Timer(0.05, stream.cancel)
                timer.start()
                started = time.monotonic()
        with pytest.raises(CancelledError):
            stream.result()
        return time.monotonic() - started

    assert ended("probe") < 3
    assert ended("decode", segments=5.0, max_tokens=100_000, num_frames=2) < 3


def test_an_abandoned_one_leaves_nothing_behind(model: Model, clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with model.stream_description(clip, segments=1.0, max_tokens=4, sidecar=path) as stream:
        next(event for event in stream if isinstance(event, Segment))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert not [t for t in threading.enumerate() if t.name.startswith("mlx-onevision-frames")]
    model.describe_video(clip, segments=5.0, max_tokens=4, sidecar=path, force=True)


def spoilt(clip: Path, path: Path, first: int, last: int) -> Path:
    """The video with the packets of some frames made nonsense."""
    data = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        for number, packet in enumerate(container.demux(video=0)):
            if first <= number < last and packet.pos is not None:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    return written(path, bytes(data))


def test_a_part_that_is_broken_is_left_out(model: Model, clip: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"segments": 2.0, "num_frames": 4, "max_tokens": 4}
    path = spoilt(clip, tmp_path / "spoilt.mp4", 48, 72)
    described = model.describe_video(path, **options, sidecar=tmp_path / "a.jsonl")
    whole = model.describe_video(clip, **options)
    assert len(described.segments) == 5
    for number in (0, 1, 4):
        assert described.segments[number] == whole.segments[number]
    assert described.segments[3].frames
    assert (described.segments[2].text, described.segments[2].frames) == ("", ())
    assert "0:00:04.000 to 0:00:06.000" in described.warnings[0]
    for warning in described.warnings[1:]:  # of frames that follow the damage
        assert "frames of 0:00:06.000 to 0:00:08.000 cannot be decoded" in warning
    no_check = spoilt(clip, tmp_path / "nothing.mp4", 0, 120)
    with pytest.raises(MediaError, match=r"nothing\.mp4"):
        model.describe_video(no_check, **options)


def test_an_empty_caption_is_a_warning(
    model: Model, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_text", lambda answer: answer.result() and "")
    described = model.describe_video(clip, segments=5.0, num_frames=1, max_tokens=1)
    assert described.warnings[1].startswith("0:00:05.000 to 0:00:10.000 is not described: the ")
    assert len(described.warnings) == len(described.segments) == 2


def test_a_video_that_breaks_off_says_so(model: Model, tmp_path: Path) -> None:
    data = encode_video(
        map(numbered, range(80)), container={"movflags": "faststart"}, options={"g": "10"}
    )
    path = written(tmp_path / "half.mp4", data[: len(data) * 3 // 4])
    described = model.describe_video(path, segments=1.0, num_frames=2, max_tokens=4)
    assert "breaks off" in described.warnings[0] and described.segments[0].frames


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"segments": "shots"}, RequestError, "give scenes, or seconds"),
        ({"segments": 0}, RequestError, "more than 0 seconds"),
        ({"segments": 1e-9}, RequestError, "use longer ones"),
        ({"longest": -1}, RequestError, "longest"),
        ({"finder": "eyes"}, RequestError, "the finder"),
        ({"num_frames": 0}, RequestError, "num_frames"),
        ({"num_frames": 10**9}, ContextOverflowError, "use fewer frames"),
        ({"start": 5, "end": 2}, RequestError, "not after start"),
        ({"start": 99}, RequestError, "start is 99 s"),
        ({"max_tokens": 0}, RequestError, "max_tokens"),
        ({"temperature": -1}, RequestError, "temperature"),
        ({"frames": 3}, RequestError, "no option 'frames'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    model: Model, clip: Path, options: dict[str, Any], error: type[OneVisionError], part: str
) -> None:
    with pytest.raises(error, match=part) as refused:
        model.describe_video(clip, **options)
    message = str(refused.value)
    assert "\n" not in message and not message.endswith(".") and len(message) < 300


def test_frames_without_a_clock_are_refused(model: Model) -> None:
    for frames in (np.zeros((5, 8, 8, 3), np.uint8), [np.zeros((8, 8, 3), np.uint8)]):
        with pytest.raises(RequestError, match="no clock"):
            model.describe_video(frames)
    with pytest.raises(MediaError, match="does not exist"):
        model.describe_video("no/such.mp4")


# Memory.


def test_segments_that_are_done_are_not_kept(tiny: Path, clip: Path) -> None:
    model = load(tiny)
    try:
        held: list[tuple[int, int]] = []
        for event in model.stream_description(clip, segments=0.5, num_frames=4, max_tokens=2):
            if isinstance(event, Segment):
                bank = model._engine._worker.call(lambda runner: runner.model.bank)
                held.append((bank.nbytes, len(bank._entries)))
        assert len(held) == 20 and max(held) <= (0, 2)
    finally:
        model.close()


def repeated(source: Path, path: Path, rate: int, times: int) -> Path:
    """The video so many times over: its packets again, with later stamps."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        packets = [packet for packet in given.demux(stream) if packet.size]
        assert packets[0].time_base is not None
        span = round(len(packets) / rate / packets[0].time_base)
        for number in range(times):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.stream, again.time_base = copy, packet.time_base
                again.pts = (packet.pts or 0) + number * span
                again.dts = (packet.dts or 0) + number * span
                again.duration, again.is_keyframe = packet.duration, packet.is_keyframe
                out.mux(again)
    return path


PEAK = """
import json, resource, sys
from mlx_onevision import load
model = load(sys.argv[1])
described = model.describe_video(
    sys.argv[2], segments=float(sys.argv[3]), num_frames=2, max_tokens=4
)
both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
peaks = [resource.getrusage(who).ru_maxrss for who in both]
print(json.dumps([described.duration, len(described.segments), *peaks]))
"""


def test_an_hour_takes_the_memory_of_a_minute(tiny: Path, tmp_path: Path) -> None:
    rate, frames = 12, [np.full((1080, 1920, 3), 20 * n, np.uint8) for n in (0, 3, 6, 9)] * 6
    fast = {"preset": "ultrafast", "g": "12", "bf": "0"}
    few = written(tmp_path / "few.mp4", encode_video(frames, rate=rate, options=fast))
    peaks = []
    for seconds in (60, 3600):
        path = repeated(few, tmp_path / f"{seconds}.mp4", rate, seconds * rate // len(frames))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, tiny, path, str(seconds / 6)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        duration, segments, parent, child = json.loads(done.stdout)
        assert duration == pytest.approx(seconds, abs=1) and segments == 6
        peaks.append((parent + child) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 300_000_000, peaks
