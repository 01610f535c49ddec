"""The prompts of a description, and chapters and a summary from captions, in text only.

A long video has more captions than a model can read at once. They are then summarised in groups
that fit, and the summaries again, until what is left fits.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise

from mlx_onevision.describe.formats import Chapter, Segment
from mlx_onevision.errors import ContextOverflowError

# The demo model is trained on the very words of these prompts, so a change here wants it trained
# again. Numbers and times are left out on purpose: a model that reads none repeats none.
SEGMENT = "Describe what happens in this video in one or two sentences."

MOST_CHAPTERS = 12
LONGEST_TITLE = 100  # characters

Ask = Callable[[str, int], str]
"""The answer to a prompt, of so many tokens at most."""
Fits = Callable[[str, int], bool]
"""Whether a model can read a prompt at once and answer with so many tokens."""
Question = Callable[[Sequence[str]], str]
"""A prompt about captions."""


def summary_question(captions: Sequence[str]) -> str:
    """Asks for a summary of a video, by the captions of its segments in order."""
    return _prompt("These are the scenes of a video, in order:", captions) + (
        "Summarise the video in one to three sentences."
    )


def title_question(captions: Sequence[str]) -> str:
    """Asks for the title of a chapter, by its captions in order."""
    return _prompt("This happens in a part of a video:", captions) + (
        "Give this part of the video a title of two to six words."
    )


def _prompt(opening: str, captions: Sequence[str]) -> str:
    """A caption a line; line breaks within one are not kept."""
    lines = (f"- {' '.join(caption.split())}" for caption in captions)
    return "\n".join([opening, *lines]) + "\n\n"


def chapter_firsts(segments: Sequence[tuple[float, float]], most: int = MOST_CHAPTERS) -> list[int]:
    """Which segments chapters begin with: each one, or, of more than ``most``, those that begin
    nearest to where equally long chapters would.

    So chapters begin where the video changes, none is much shorter than the others, and a segment
    that is longer than that is one.

    segments : start and end of each, in order.
    """
    if len(segments) <= most:
        return list(range(len(segments)))
    starts = [start for start, _ in segments]
    begin, length = starts[0], segments[-1][1] - starts[0]
    firsts = {0}
    for number in range(1, most):
        ideal = begin + length * number / most
        after = min(bisect_left(starts, ideal), len(starts) - 1)
        firsts.add(min((after - 1, after), key=lambda place: abs(starts[place] - ideal)))
    return sorted(firsts)


def prompts_digest() -> str:
    """A digest that changes with the words of the prompts."""
    words = (SEGMENT, summary_question(["…"]), title_question(["…"]))
    return blake2b("\0".join(words).encode(), digest_size=8).hexdigest()


class Outline:
    """Titles and a summary of described segments, one after another."""

    def __init__(
        self, ask: Ask, fits: Fits, summary_tokens: int = 256, title_tokens: int = 32
    ) -> None:
        self._ask, self._fits = ask, fits
        self._summary_tokens, self._title_tokens = summary_tokens, title_tokens

    def chapters(self, segments: Sequence[Segment]) -> Iterator[Chapter]:
        """Each as soon as it has its title.

        Raises:
            ContextOverflowError: where not even two captions fit into the model's context.
        """
        firsts = chapter_firsts([(segment.start, segment.end) for segment in segments])
        for number, (first, after) in enumerate(pairwise([*firsts, len(segments)]), 1):
            captions = _captions(segments[first:after])
            title = ""
            if captions:
                question = title_question(self._condensed(captions, title_question))
                title = _title(self._ask(question, self._title_tokens))
            yield Chapter(segments[first].start, title or f"Part {number}")

    def summary(self, segments: Sequence[Segment]) -> str:
        """In one text; that of a lone caption is the caption.

        Raises:
            ContextOverflowError: as for :meth:`chapters`.
        """
        captions = _captions(segments)
        if len(captions) < 2:
            return "".join(captions)
        captions = self._condensed(captions, summary_question)
        return self._ask(summary_question(captions), self._summary_tokens)

    def _condensed(
        self, captions: list[str], question: Callable[[Sequence[str]], str]
    ) -> list[str]:
        """Captions, or summaries of them, that fit into ``question``."""
        while not self._fits(question(captions), self._summary_tokens):
            if len(captions) < 2:
                raise ContextOverflowError("a caption does not fit into the model's context")
            groups = self._groups(captions)
            captions = [
                self._ask(summary_question(group), self._summary_tokens)
                if len(group) > 1
                else group[0]
                for group in groups
            ]
        return captions

    def _groups(self, captions: Sequence[str]) -> list[Sequence[str]]:
        """Neighbours that fit into one question: as few groups as will do, all equally large."""
        for count in range(2, len(captions)):
            edges = [number * len(captions) // count for number in range(count + 1)]
            groups = [captions[first:after] for first, after in pairwise(edges)]
            if all(self._fits(summary_question(group), self._summary_tokens) for group in groups):
                return groups
        raise ContextOverflowError(
            "two captions do not fit into the model's context together; use fewer max_tokens"
        )


def _captions(segments: Sequence[Segment]) -> list[str]:
    """The captions, one after another, without those that repeat the one before."""
    captions: list[str] = []
    for segment in segments:
        caption = " ".join(segment.text.split())
        if caption and caption not in captions[-1:]:
            captions.append(caption)
    return captions


def _title(answer: str) -> str:
    """The first line, without what models like to put around a title."""
    line = next(iter(answer.strip().splitlines()), "")
    line = line.strip().removeprefix("Title:").strip(" \t\"'*#_“”‘’").removesuffix(".")
    return line[:LONGEST_TITLE].rstrip()
