"""What is written about a video comes back from the programs that read such files."""

import csv
import io
import json
import re

import pysubs2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_onevision.describe.formats import FORMS, Chapter, Segment, VideoDescription, clock, write
from mlx_onevision.errors import RequestError

HARD = (
    "Two people talk.\n\nOne waves --> the other <i>laughs</i> & leaves; 3 < 4, {\\an8} up,"
    ' "quoted", *starred*\r\nand \u2028 so on. 这是什么 🦊'
)
WHOLE = VideoDescription(
    source="films/a [1].mp4",
    duration=3725.5,
    model="demo",
    segments=(
        Segment(0.0, 2.04, "A red circle.", (0.0, 1.0, 2.0)),
        Segment(2.04, 3661.0, HARD),
        Segment(3661.0, 3661.0001, "A blink."),
        Segment(3662.0, 3725.5, " \n "),
    ),
    summary="A circle,\nthen people.",
    chapters=(Chapter(0.0, "The circle"), Chapter(2.04, "People_talking")),
    warnings=("The last 3 seconds could not be read.",),
)
EMPTY = VideoDescription("b.mp4", 1.0, "demo", ())


def squeezed(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("description", [WHOLE, EMPTY], ids=["whole", "empty"])
def test_a_description_survives_json(description: VideoDescription) -> None:
    assert VideoDescription.from_dict(json.loads(write(description, "json"))) == description
    assert VideoDescription.from_dict(description.to_dict()) == description
    for segment in description.segments:
        assert Segment.from_dict(json.loads(json.dumps(segment.to_dict()))) == segment
    assert "not the sound" in description.to_dict()["note"]


def test_lines_of_json_are_segments_and_the_video() -> None:
    *rows, video = map(json.loads, write(WHOLE, "jsonl").splitlines())
    assert [row["type"] for row in rows] == ["segment"] * 4
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert tuple(map(Segment.from_dict, rows)) == WHOLE.segments
    assert video["type"] == "video" and "segments" not in video
    assert VideoDescription.from_dict(video | {"segments": rows}) == WHOLE


@pytest.mark.parametrize("form", ["srt", "vtt"])
def test_pysubs2_reads_the_subtitles(form: str) -> None:
    read = pysubs2.SSAFile.from_string(write(WHOLE, form), format_=form)
    assert [(cue.start, cue.end) for cue in read] == [
        (0, 2040),
        (2040, 3661000),
        (3661000, 3661001),
        (3662000, 3725500),
    ]
    texts = [cue.plaintext for cue in read]
    if form == "srt":
        # What looks like a tag has wide brackets in SubRip, which knows no escapes.
        texts = [text.replace("＜", "<").replace("｛", "{") for text in texts]
        assert texts == ["A red circle.", squeezed(HARD), "A blink.", "(not described)"]
    else:
        for escape, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            texts = [text.replace(escape, character) for text in texts]
        # pysubs2 takes braces for a tag of another format and drops them.
        braced = squeezed(HARD).replace("{\\an8}", "")
        assert texts == ["A red circle.", braced, "A blink.", "(not described)"]


@given(st.lists(st.text(max_size=60), max_size=6))
def test_no_text_breaks_the_subtitles(texts: list[str]) -> None:
    segments = tuple(Segment(n, n + 0.5, text) for n, text in enumerate(texts))
    description = VideoDescription("a.mp4", 10.0, "demo", segments)
    starts = [n * 1000 for n in range(len(texts))]  # those of segments without text, too
    for form in ("srt", "vtt"):
        written = write(description, form)
        read = pysubs2.SSAFile.from_string(written, format_=form)
        assert [cue.start for cue in read] == starts
        times = re.findall(r"^\d\d:\d\d:\d\d[.,]\d{3} --> \d\d:\d\d:\d\d[.,]\d{3}$", written, re.M)
        assert len(times) == len(starts)


def test_the_subtitles_are_what_their_formats_ask_for() -> None:
    assert write(EMPTY, "srt") == ""
    assert write(EMPTY, "vtt").startswith("WEBVTT\n\n")
    assert write(WHOLE, "srt").startswith("1\n00:00:00,000 --> 00:00:02,040\nA red circle.\n\n2\n")
    assert "\n\n00:00:00.000 --> 00:00:02.040\nA red circle.\n\n00:" in write(WHOLE, "vtt")


def test_csv_comes_back() -> None:
    rows = list(csv.DictReader(io.StringIO(write(WHOLE, "csv"), newline="")))
    assert [row["text"] for row in rows] == [segment.text for segment in WHOLE.segments]
    assert rows[1]["start"] == "2.040" and rows[1]["end"] == "3661.000"


def test_text_has_a_line_a_segment() -> None:
    lines = write(WHOLE, "text").splitlines()
    assert lines[:3] == ["A circle, then people.", "", "[0:00:00.000 - 0:00:02.040] A red circle."]
    assert len(lines) == 2 + 4 + 1


def test_markdown_shows_texts_as_they_are() -> None:
    text = write(WHOLE, "md")
    assert text.startswith("# films/a \\[1\\].mp4\n\nA circle, then people.\n\n## Chapters\n\n")
    assert "- 0:00:02 People\\_talking" in text
    assert "\\<i\\>laughs\\</i\\>" in text and "\\*starred\\*" in text
    assert "not the sound" in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0:00:00.000"),
        (59.9996, "0:01:00.000"),
        (3661.5, "1:01:01.500"),
        (360000, "100:00:00.000"),
    ],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_what_is_no_description_is_refused_in_a_sentence() -> None:
    good = WHOLE.to_dict()
    for wrong in (
        {},
        {**good, "version": 2},
        {**good, "duration": "long"},
        {**good, "segments": [{"start": 1}]},
        {**good, "segments": [{"start": 2, "end": 1, "text": ""}]},
        {**good, "segments": 5},
        {**good, "chapters": ["one"]},
        {**good, "summary": None},
    ):
        with pytest.raises(RequestError) as refused:
            VideoDescription.from_dict(wrong)
        assert len(str(refused.value)) < 200 and "\n" not in str(refused.value)
    for start, end in ((1, 1), (-1, 2), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(RequestError):
            Segment(start, end, "")
    with pytest.raises(RequestError, match="docx"):
        write(WHOLE, "docx")
    assert set(FORMS) == {"text", "json", "jsonl", "srt", "vtt", "md", "csv"}
