"""Streaming detokenizer: whole characters only, cut before stop strings."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from mlx_onevision.errors import RequestError


class TokenBytes(Protocol):
    """The part of a tokenizer that is needed: the bytes that a token adds to the text."""

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Turns tokens into text as they come, holding an incomplete character back. All of the text is
    ``tokenizer.decode(ids)`` without special tokens.
    """

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters that a token completes."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD where the last character is incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string that is complete in it, however the text
    is chunked; of several that end at the same place, the longest. Text is held back only while it
    may still become a stop string.
    """

    def __init__(self, stops: str | Sequence[object] = ()) -> None:
        """Raises RequestError for a stop string that is empty or not text."""
        self._stops: list[str] = []
        for stop in [stops] if isinstance(stops, str) else stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop string {stop!r} is not a text with characters in it")
            self._stops.append(stop)
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
    """The length of the longest end of ``text`` that is a beginning of ``stop``, but not all."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
