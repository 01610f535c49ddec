"""Streaming detokenizer: whole characters only, cut before stop strings."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from mlx_onevision.errors import RequestError


class TokenBytes(Protocol):
    """A tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Joins the bytes of tokens into text, holding an incomplete character back: the pieces joined
    are ``tokenizer.decode(ids)`` with special tokens skipped.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string that is complete in it, however the text
    is chunked; of several that end at the same place, the longest. Text is held back only while it
    may still become a stop string.
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
        """The stop string that ended the text."""

    def add(self, text: str) -> str:
        """The text that can be emitted now; none once ``found`` is set."""
        if self.found is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            start, self.found = min(found, key=lambda one: (one[0] + len(one[1]), one[0]))
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
