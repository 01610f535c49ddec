"""One conversation answered: tokens to text, as a stream or as a whole."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_onevision.detokenizer import Detokenizer, StopStrings
from mlx_onevision.engine import Engine
from mlx_onevision.errors import RequestError
from mlx_onevision.processor import Inputs
from mlx_onevision.sampling import Sampling
from mlx_onevision.text import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Tokens: of the prompt, how many of these were in the cache already, how many of them stand for
    images and videos, and of the answer. Seconds of wall time: pictures to tiles to ids, loading
    mlx-lm (once a process, while tiles are encoded), tiles to features beyond that, reading the
    prompt up to the first token, and the tokens after that.
    """

    prompt_tokens: int
    cached_tokens: int
    media_tokens: int
    encoded_media: int
    completion_tokens: int
    prepare_seconds: float
    import_seconds: float
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float
    peak_memory_bytes: int

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens read a second, those from the cache left out."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens a second after the first one."""
        return _rate(self.completion_tokens - 1, self.decode_seconds)


@dataclass(frozen=True)
class Generation:
    """An answer.

    tokens : the generated ids, with the end-of-text token where there is one, as in the reference.
    finish_reason : ``stop`` (the model ended, or a stop string came), ``length`` (max_tokens or the
        context was used up) or ``cancelled``.
    notes : what of the videos was not used as it was asked for, a sentence each.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; rates included."""
        values = asdict(self)
        values |= {"tokens": list(self.tokens), "notes": list(self.notes)}
        for rate in ("prompt_tokens_per_second", "tokens_per_second"):
            values["usage"][rate] = getattr(self.usage, rate)
        return values


class Stream:
    """An answer on its way: an iterator of pieces of text, whole characters each.

    The pieces joined are :attr:`Generation.text`. An abandoned stream cancels itself.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        inputs: Inputs,
        sampling: Sampling,
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        prepare_seconds: float = 0.0,
    ) -> None:
        if type(max_tokens) is not int or max_tokens < 1:
            raise RequestError(f"max_tokens must be a whole number, 1 or more, not {max_tokens!r}")
        self._eos = engine.defaults.eos_token_ids
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._result: Generation | None = None
        self._prepare_seconds = prepare_seconds
        self._notes = inputs.notes
        self._media_tokens = sum(medium.tokens for medium in inputs.media)
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)
        self._source = engine.generate(inputs, sampling, max_tokens)
        self._text = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._text)

    def cancel(self) -> None:
        """Ends the answer before its next token; what has come so far is its result."""
        self._source.cancel()

    def result(self) -> Generation:
        """The whole answer, waited for."""
        for _ in self._text:
            pass
        if self._result is None:
            raise RequestError("the answer failed while it was streamed; ask again")
        return self._result

    def _run(self) -> Iterator[str]:
        finish: FinishReason | None = None
        try:
            for token in self._source:
                self._tokens.append(token)
                if token in self._eos:
                    finish = "stop"
                    continue  # the engine ends by itself, and fills in the counters
                if finish is None:
                    piece = self._stop.add(self._detokenizer.add(token))
                    if piece:
                        self._pieces.append(piece)
                        yield piece
                    if self._stop.found:
                        finish = "stop"
                        break
        finally:
            self._source.cancel()
        if self._stop.found:
            # The counters are complete once the engine has noticed.
            for _ in self._source:
                pass
        else:
            piece = self._stop.add(self._detokenizer.finish()) + self._stop.finish()
            if piece:
                self._pieces.append(piece)
                yield piece
        if finish is None:
            finish = "cancelled" if self._source.interrupted else "length"
        counters = self._source.counters
        self._result = Generation(
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            finish_reason=finish,
            usage=Usage(
                prompt_tokens=counters.prompt_tokens,
                cached_tokens=counters.cached_tokens,
                media_tokens=self._media_tokens,
                encoded_media=counters.encoded_media,
                completion_tokens=len(self._tokens),
                prepare_seconds=self._prepare_seconds,
                import_seconds=counters.import_seconds,
                encode_seconds=counters.encode_seconds,
                prefill_seconds=counters.prefill_seconds,
                decode_seconds=counters.decode_seconds,
                peak_memory_bytes=counters.peak_memory,
            ),
            notes=self._notes,
        )


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0
