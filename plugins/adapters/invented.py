"""What a backend without a model says: the question again, vectors made of bytes, and how likely
all that was. Always the same; standard library only.
"""

import hashlib
import math
import zlib
from collections import deque
from collections.abc import Sequence

from mlx_onevision.plugins.contract.media import Message
from mlx_onevision.plugins.contract.results import Likelihood, TokenLogprob

DIM = 16


def answer(messages: Sequence[Message]) -> list[str]:
    """What was asked last, word by word, and what came with all of it."""
    said = [part for message in messages for part in message.parts if isinstance(part, str)]
    media = [medium for message in messages for medium in message.media]
    pieces = [f"{word} " for word in (said[-1].split() if said else [])]
    for kind in ("image", "video"):
        count = sum(medium.kind == kind for medium in media)
        pieces.append(f"[{count} {kind}{'' if count == 1 else 's'}]")
    return pieces


def vector(data: bytes, normalize: bool) -> tuple[float, ...]:
    digest = hashlib.blake2b(data, digest_size=DIM).digest()
    values = [byte - 127.5 for byte in digest]
    length = math.sqrt(sum(value * value for value in values)) if normalize else 1.0
    return tuple(value / length for value in values)


class Likelihoods:
    """Of the pieces of an answer, made up but always the same; told as their text is shown.

    count : how many of each place; None tells nothing.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()
        self._given = self._shown = 0
        self._told: list[TokenLogprob] = []

    def add(self, piece: str) -> None:
        """A piece has come; what of it is shown is not known yet."""
        if self._count is not None:
            self._waiting.append((self._given, _told(piece, self._count)))
            self._given += len(piece)

    def show(self, text: str) -> tuple[TokenLogprob, ...]:
        """A text that is shown, and with it the pieces that begin before its end."""
        self._shown += len(text)
        news: list[TokenLogprob] = []
        while self._waiting and self._waiting[0][0] < self._shown:
            news.append(self._waiting.popleft()[1])
        self._told += news
        return tuple(news)

    @property
    def told(self) -> tuple[TokenLogprob, ...] | None:
        return None if self._count is None else tuple(self._told)


def _told(piece: str, count: int) -> TokenLogprob:
    data = piece.encode()
    likely = -0.01 - zlib.crc32(data) % 64 / 100
    others = [(f"other {n}", likely - 1.0 - n) for n in range(1, count)]
    top = [(piece, likely), *others][:count]
    return TokenLogprob(
        piece, data, likely, tuple(Likelihood(word, word.encode(), p) for word, p in top)
    )
