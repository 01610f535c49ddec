"""Requests of every kind for tests of batches, and what serves them without a thread."""

import threading
from typing import Any

import numpy as np
from images import picture

from mlx_onevision.engine.request import ActiveRequest, PromptRequest, TokenText
from mlx_onevision.errors import CancelledError
from mlx_onevision.prompt.processor import Inputs
from mlx_onevision.sampling.sampler import Sampling

LONG = "one two three four five six seven eight nine ten " * 30  # prompts of several chunks
TOKENS = 16
GREEDY = Sampling()


def turn(text: str, *media: Any) -> dict[str, Any]:
    """One message about pictures, and arrays of four axes, which are videos."""
    kinds = ["video" if getattr(medium, "ndim", 3) == 4 else "image" for medium in media]
    blocks = [{"type": kind, kind: medium} for kind, medium in zip(kinds, media, strict=True)]
    return {"role": "user", "content": [*blocks, {"type": "text", "text": text}]}


ROWS: list[list[dict[str, Any]]] = [
    [turn("hello")],
    [turn("what is in this image", picture(0))],
    [turn("which of the two", picture(1), picture(2, 40, 90))],
    [turn(LONG)],
    [
        turn("what is it", picture(0)),
        {"role": "assistant", "content": "a red star"},
        turn("where"),
    ],
    [turn(LONG + "and this", picture(3, 300, 500))],
    [turn("what moves here", np.stack([picture(n, 40, 60) for n in range(5)]))],
]


# On the inference thread.


class Waiting(ActiveRequest):
    """Keeps its tokens and ends, and is cancelled after so many tokens."""

    def __init__(
        self,
        prompt: Inputs,
        cancel_after: int | None = None,
        sampling: Sampling = GREEDY,
        max_tokens: int = TOKENS,
    ) -> None:
        request = PromptRequest(prompt, sampling, max_tokens)
        super().__init__(request, NoText(), max_tokens, (), threading.Event())
        self.tokens: list[int] = []
        self._cancel_after = cancel_after

    def check(self, *_: object) -> None:
        if self._cancel_after is not None and len(self.tokens) >= self._cancel_after:
            raise CancelledError("the request was cancelled")

    def accept(self, token: int) -> None:
        super().accept(token)
        self.tokens.append(token)

    def drain(self) -> None:
        items = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        assert all(isinstance(item, TokenText) for item in items[:-1]), "something after the end"
        self.failure = items[-1]
        assert self.failure is None or isinstance(self.failure, BaseException)


class NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""
