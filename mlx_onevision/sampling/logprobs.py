# pyright: reportUnknownMemberType=false
"""Logprobs of an answer's tokens and of the likeliest alternatives.

They are natural logarithms of probabilities after penalties and a schema, and before temperature
and filters, which is what mlx-lm hands to its samplers. They are computed there, as a part of the
same step, so that the next one need not wait for them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.sampling.ranges import check_range

if TYPE_CHECKING:
    import mlx.core as mx

LOGPROB_FLOOR = -9999.0
"""In place of the logarithm of 0, for which JSON has no number."""


@dataclass(frozen=True)
class TopLogprob:
    """A token, and how likely it was at its position.

    token : its text, with U+FFFD for a part of a character; a control token's name.
    data : the bytes that it adds to the text; none for a control token.
    logprob : natural logarithm of its probability, LOGPROB_FLOOR where that is 0.
    """

    id: int
    token: str
    data: bytes
    logprob: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; bytes are numbers."""
        values = {"id": self.id, "token": self.token, "bytes": list(self.data)}
        return {**values, "logprob": self.logprob}


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """The token that was chosen. top : the likeliest ones at its position, the likeliest first."""

    top: tuple[TopLogprob, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "top": [other.to_dict() for other in self.top]}


class Names(Protocol):
    """The part of a tokenizer that is needed: the bytes and the names of tokens."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def id_to_token(self, token_id: int) -> str | None: ...


class LogprobRecorder:
    """Records logprobs of one answer on the inference thread, for another thread to take.

    count : how many alternatives at each position. Raises RequestError out of range.
    """

    def __init__(self, count: int) -> None:
        check_range("logprobs", count)
        self._count = count
        self._ahead: deque[tuple[mx.array, mx.array]] = deque()
        self._recorded: deque[tuple[NDArray[np.uint32], NDArray[np.float32]]] = deque()

    def sampler(self, choose: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A sampler as mlx-lm calls it, which does what ``choose`` does and records it; it replaces
        the one of the last call.
        """
        import mlx.core as mx

        self._ahead.clear()

        def chosen(logprobs: "mx.array") -> "mx.array":
            token = choose(logprobs)
            found = _likeliest(logprobs[0], token, self._count)
            mx.async_eval(found)
            self._ahead.append(found)
            return token

        return chosen

    def record(self) -> None:
        """Keeps the logprobs of the next token, which has come."""
        ids, logprobs = self._ahead.popleft()
        self._recorded.append((np.array(ids, np.uint32), np.array(logprobs, np.float32)))

    def end(self) -> None:
        """Drops what mlx-lm has computed in advance."""
        self._ahead.clear()

    def take(self) -> tuple[list[int], list[float]]:
        """Ids and logprobs at the next position: of the chosen token, then of the likeliest, the
        likeliest first.
        """
        ids, logprobs = (values.tolist() for values in self._recorded.popleft())
        chosen = (ids[0], logprobs[0])
        others = list(zip(ids[1:], logprobs[1:], strict=True))
        # Of equally likely tokens the device returns any; the chosen one is made one of them.
        least = min((logprob for _, logprob in others), default=0.0)
        if others and chosen not in others and chosen[1] >= least:
            others[others.index(min(others, key=lambda other: other[1]))] = chosen
        others.sort(key=lambda other: (-other[1], other[0]))
        ordered = [chosen, *others]
        return [i for i, _ in ordered], [
            min(max(logprob, LOGPROB_FLOOR), 0.0) for _, logprob in ordered
        ]


def _likeliest(logprobs: "mx.array", token: "mx.array", count: int) -> "tuple[mx.array, mx.array]":
    """Ids, uint32 (1 + count,), and logprobs (1 + count,) of the chosen token and the likeliest.

    logprobs : (vocabulary,). token : (1,).
    """
    import mlx.core as mx

    ids = token.astype(mx.uint32)
    count = min(count, logprobs.shape[0])
    if count:
        ids = mx.concatenate([ids, mx.argpartition(-logprobs, kth=count - 1)[:count]])
    return ids, mx.take(logprobs, ids)


class LogprobStream:
    """Emits the logprobs of tokens once their text has been emitted.

    Tokens that add nothing to the text, such as the end of text, and those behind a stop string's
    beginning are left out; one that is emitted in part is there whole. Without a stop string, and
    for valid UTF-8, their bytes joined are the text's.
    """

    def __init__(self, recorder: LogprobRecorder, names: Names) -> None:
        self._recorder, self._names = recorder, names
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        self.logprobs: list[TokenLogprob] = []

    def add(self, start: int) -> None:
        """Takes the logprobs of the next token, whose text begins at the character ``start``."""
        ids, logprobs = self._recorder.take()
        data = self._names.token_bytes(ids[0])
        if data:
            chosen, *top = map(self._named, ids, logprobs)
            self._waiting.append((start, TokenLogprob(**vars(chosen), top=tuple(top))))

    def emit(self, length: int) -> None:
        """Emits the logprobs of tokens that begin within the first ``length`` characters."""
        while self._waiting and self._waiting[0][0] < length:
            self.logprobs.append(self._waiting.popleft()[1])

    def _named(self, token: int, logprob: float) -> TopLogprob:
        data = self._names.token_bytes(token)
        name = data.decode("utf-8", "replace") if data else self._names.id_to_token(token) or ""
        return TopLogprob(token, name, data, logprob)
