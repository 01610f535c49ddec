"""Generated ids to text as they come: whole characters only, and stop strings never shown."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from mlx_onevision.errors import RequestError


class TokenBytes(Protocol):
    """Who knows what bytes a token stands for (a tokenizer)."""

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Joins the bytes of tokens into characters.

    The joined deltas are ``tokenizer.decode(ids)`` with special tokens skipped, for any ids and
    however they are spread over calls: a character is held back until its last byte has come.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters that this token completes, maybe none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character never became whole."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string that comes to its end in it.

    Of several that end at the same place the longest counts. What is shown does not depend on how
    the text is cut into chunks; text is held back only while it may still become a stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        """Raises RequestError for a stop string that is empty or not text."""
        stops = [stops] if isinstance(stops, str) else list(stops)
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop string {stop!r} is not a text with characters in it")
        self._stops = stops
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text, once one has."""

    def add(self, text: str) -> str:
        """What may be shown after ``text`` has come; nothing once ``found`` is set."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
