"""Chapters and summaries from captions: what is asked, and that it always fits."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_onevision.describe.formats import Segment
from mlx_onevision.describe.outline import (
    MOST_CHAPTERS,
    Outline,
    chapter_firsts,
    summary_question,
    title_question,
)
from mlx_onevision.errors import ContextOverflowError


def captioned(*captions: str, seconds: float = 4.0) -> list[Segment]:
    return [Segment(n * seconds, (n + 1) * seconds, text) for n, text in enumerate(captions)]


class Reader:
    """Answers with the beginning of what it is asked, and can read ``room`` characters."""

    def __init__(self, room: int = 10**9, answer: str | None = None) -> None:
        self.room, self.answer = room, answer
        self.asked: list[str] = []

    def ask(self, question: str, max_tokens: int) -> str:
        assert self.fits(question, max_tokens)
        self.asked.append(question)
        return f"Answer {len(self.asked)}." if self.answer is None else self.answer

    def fits(self, question: str, max_tokens: int) -> bool:
        return len(question) + max_tokens <= self.room


def test_few_scenes_are_a_chapter_each() -> None:
    reader = Reader()
    segments = captioned("A dog runs.", "A cat sleeps.", "It rains.")
    chapters = list(Outline(reader.ask, reader.fits).chapters(segments))
    assert [(c.start, c.title) for c in chapters] == [
        (0.0, "Answer 1"), (4.0, "Answer 2"), (8.0, "Answer 3"),
    ]  # fmt: skip
    assert reader.asked == [title_question([segment.text]) for segment in segments]


@settings(max_examples=60)
@given(st.lists(st.floats(0.1, 500), min_size=1, max_size=400), st.floats(0, 1000))
def test_chapters_are_few_and_begin_where_segments_do(lengths: list[float], start: float) -> None:
    edges = [start]
    for length in lengths:
        edges.append(edges[-1] + length)
    firsts = chapter_firsts(list(pairwise(edges)))
    assert firsts[0] == 0 and firsts == sorted(set(firsts)) and firsts[-1] < len(lengths)
    assert len(firsts) <= MOST_CHAPTERS
    if len(lengths) <= MOST_CHAPTERS:
        assert firsts == list(range(len(lengths)))
    if max(lengths) * 2 * MOST_CHAPTERS < edges[-1] - start:  # none so long that it takes two
        assert len(firsts) == MOST_CHAPTERS


def test_equal_segments_make_equal_chapters() -> None:
    spans = [(float(n), n + 1.0) for n in range(120)]
    assert chapter_firsts(spans) == list(range(0, 120, 10))


def test_a_summary_of_all_captions_or_of_the_only_one() -> None:
    reader = Reader()
    outline = Outline(reader.ask, reader.fits)
    assert outline.summary(captioned("A dog  runs.")) == "A dog runs." and not reader.asked
    assert outline.summary(captioned("", "")) == ""
    assert outline.summary(captioned("One.", "", "Two.", "Two.", "One.")) == "Answer 1."
    assert reader.asked == [summary_question(["One.", "Two.", "One."])]


@pytest.mark.parametrize("count", [30, 400, 3000])
def test_many_captions_are_summarised_in_levels(count: int) -> None:
    captions = [f"Scene {number} shows thing {number}." for number in range(count)]
    reader = Reader(room=1200)
    assert Outline(reader.ask, reader.fits).summary(captioned(*captions)) == (
        f"Answer {len(reader.asked)}."
    )
    first_level = "".join(q for q in reader.asked if "Scene " in q)
    for caption in captions:  # each is read, and once
        assert first_level.count(f"- {caption}\n") == 1
    assert max(map(len, reader.asked)) + 256 <= 1200
    titles = list(Outline(reader.ask, reader.fits).chapters(captioned(*captions)))
    assert len(titles) == 12


def test_what_cannot_fit_is_one_sentence() -> None:
    reader = Reader(room=600)
    with pytest.raises(ContextOverflowError, match="do not fit"):
        Outline(reader.ask, reader.fits).summary(captioned("x" * 300, "y" * 300, "z" * 300))
    with pytest.raises(ContextOverflowError, match="does not fit"):
        list(Outline(reader.ask, reader.fits).chapters(captioned("x" * 600)))


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ('"A Walk in the Park."\nMore.', "A Walk in the Park"),
        ("Title: **Rain**", "Rain"),
        ("  \n ", "Part 1"),
        ("word " * 60, "word " * 19 + "word"),
    ],
)
def test_a_title_is_one_short_line(answer: str, title: str) -> None:
    reader = Reader(answer=answer)
    (chapter,) = Outline(reader.ask, reader.fits).chapters(captioned("A dog."))
    assert chapter.title == title


def test_a_part_without_words_has_a_number() -> None:
    reader = Reader()
    chapters = list(Outline(reader.ask, reader.fits).chapters(captioned("A dog.", "")))
    assert chapters[1].title == "Part 2" and len(reader.asked) == 1
