"""Conversations answered: requests prepared and submitted, and answers as streams of text."""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, cast

from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.request import ActiveRequest, Counters, FinishReason, PromptRequest
from mlx_onevision.errors import (
    ContextOverflowError,
    OneVisionError,
    OutOfMemoryError,
    RequestError,
)
from mlx_onevision.media.image import ImageSource
from mlx_onevision.media.video import VideoSource, no_check
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Order, Processor, Tiling
from mlx_onevision.prompt.tokenizer import Tokenizer
from mlx_onevision.sampling.grammar import Grammar, Grammars
from mlx_onevision.sampling.logprobs import LogprobStream, TokenLogprob
from mlx_onevision.sampling.ranges import check_range
from mlx_onevision.sampling.sampler import Sampling

Messages = Sequence[Mapping[str, Any]]

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Usage:
    """What an answer took. Seconds are wall time.

    prompt_tokens : of the prompt, media included.
    cached_tokens : those of them whose keys and values were there from an earlier request.
    media_tokens : those of them that images and videos became.
    encoded_media : images and videos that went through the tower; the others' features were kept.
    completion_tokens : of the answer, the end-of-text token included.
    prepare_seconds : from images and texts to tiles and ids.
    import_seconds : loading mlx-lm, once a process, while tiles are encoded.
    encode_seconds : from tiles to features, beyond that.
    prefill_seconds : from there to the first token.
    decode_seconds : from the first token to the last.
    peak_memory_bytes : MLX's peak while it ran, of all that ran at the time.
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

    @classmethod
    def of(cls, active: ActiveRequest | None, tokens: int) -> "Usage":
        """From the counters of a request.

        active : the request; None where it never began.
        tokens : how many its answer has.
        """
        counters = vars(Counters() if active is None else active.counters)
        counters = {**counters, "completion_tokens": tokens}
        media = active.request.inputs.media if active else ()
        return cls(
            media_tokens=sum(medium.tokens for medium in media),
            prepare_seconds=active.request.prepare_seconds if active else 0.0,
            **counters,
        )

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens prefilled a second, those from the cache left out."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens a second after the first one."""
        return _rate(self.completion_tokens - 1, self.decode_seconds)


@dataclass(frozen=True)
class Generation:
    """An answer.

    text : of the answer, without special tokens and without the stop string.
    tokens : the generated ids, with the end-of-text token where there is one, as in the reference.
    finish_reason : ``stop`` (the model ended, or a stop string came), ``length`` (max_tokens or the
        context was used up), ``cancelled``, or, in a batch, ``error``.
    usage : tokens, seconds and memory; see :class:`Usage`.
    notes : what of the videos was not used as it was asked for, a sentence each.
    error : what went wrong with this answer of a batch; ``text`` is what had come until then.
    logprobs : where asked for; see :class:`~mlx_onevision.sampling.logprobs.LogprobStream`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    notes: tuple[str, ...] = ()
    error: OneVisionError | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def _repr_html_(self) -> str:
        """For a notebook: the text, which is nobody's HTML, and a line of figures."""
        spent = self.usage
        figures = (
            f"{self.finish_reason}; {spent.prompt_tokens:,} prompt tokens, "
            f"{spent.completion_tokens:,} of the answer, {spent.tokens_per_second:.1f} a second"
        )
        lines = [figures, *self.notes, *([str(self.error)] if self.error else [])]
        return (
            f'<div style="white-space: pre-wrap">{escape(self.text)}</div>'
            f"<small>{'<br>'.join(map(escape, lines))}</small>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; rates included."""
        usage = asdict(self.usage)
        for rate in ("prompt_tokens_per_second", "tokens_per_second"):
            usage[rate] = getattr(self.usage, rate)
        values: dict[str, Any] = {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "usage": usage,
            "notes": list(self.notes),
        }
        if self.logprobs is not None:
            values["logprobs"] = [token.to_dict() for token in self.logprobs]
        if self.error is not None:
            values["error"] = {"code": self.error.code, "message": str(self.error)}
        return values


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


class Stream:
    """An answer on its way: an iterator of pieces of text, joined :attr:`Generation.text`.
    What goes wrong is raised while it is iterated. An abandoned stream cancels itself.

    source : the request, or the error for which it could not be started.
    tokenizer : for the texts of the tokens in ``logprobs``.
    """

    def __init__(self, source: ActiveRequest | OneVisionError, tokenizer: Tokenizer) -> None:
        self._active = source if isinstance(source, ActiveRequest) else None
        self._error = source if isinstance(source, OneVisionError) else None
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._emitted = 0  # characters in them
        self._result: Generation | None = None
        recorder = self._active.recorder if self._active else None
        self._logprobs = None if recorder is None else LogprobStream(recorder, tokenizer)
        self._items = iter(self._active or ())
        self._ended = False
        # Not a generator's ``finally``, which is not run where nobody has asked for a piece.
        self._cancelling = weakref.finalize(self, self._active.cancel if self._active else no_check)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        try:
            text = self._next()
        except BaseException as error:
            if isinstance(error, OneVisionError):
                self._error = error
            self._end()
            raise
        if text is None:
            self._end()
            raise StopIteration
        return text

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """Where they were asked for: of the tokens that the pieces so far are made of."""
        return () if self._logprobs is None else self._logprobs.logprobs

    def cancel(self) -> None:
        """Ends the answer before its next token; what has come so far is its result."""
        if self._active is not None:
            self._active.cancel()

    def result(self) -> Generation:
        """The whole answer, waited for.

        Raises:
            OneVisionError: what ended it, if something did.
            RequestError: where an error of another kind has ended its iteration before.
        """
        for _ in self:
            pass
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RequestError("the answer failed while it was streamed; ask again")
        return self._result

    def outcome(self) -> Generation:
        """As :meth:`result`, but a OneVisionError is in ``error`` of what it returns."""
        try:
            return self.result()
        except OneVisionError as error:
            return self._generation("error", error)

    def _next(self) -> str | None:
        """The next piece; None at the end, where there is a result."""
        if self._active is None:
            assert self._error is not None
            raise self._error
        for item in self._items:
            if item.token is not None:
                self._tokens.append(item.token)
                if self._logprobs is not None:
                    self._logprobs.add(item.start)
            if item.text:
                self._emitted += len(item.text)
                self._pieces.append(item.text)
                if self._logprobs is not None:
                    self._logprobs.emit(self._emitted)
                return item.text
        self._result = self._generation(self._active.finish_reason)
        return None

    def _end(self) -> None:
        self._ended = True
        self._cancelling()

    def _generation(self, finish: FinishReason, error: OneVisionError | None = None) -> Generation:
        return Generation(
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            finish_reason=finish,
            error=error,
            usage=Usage.of(self._active, len(self._tokens)),
            notes=self._active.request.inputs.notes if self._active else (),
            logprobs=None if self._logprobs is None else tuple(self._logprobs.logprobs),
        )


def submit(engine: Engine, tokenizer: Tokenizer, request: PromptRequest) -> Stream:
    """Starts one answer. Raises ContextOverflowError for a prompt beyond the model's context, and
    OutOfMemoryError for one that cannot stay within the memory limit.
    """
    active = engine.admit(request, tokenizer)
    engine.submit([active])
    return Stream(active, tokenizer)


def submit_all(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[PromptRequest | OneVisionError]
) -> list[Stream]:
    """Starts answers that run together, in order. The stream of a request that failed while it was
    prepared, or is refused, raises its error.
    """
    sources: list[ActiveRequest | OneVisionError] = []
    for request in requests:
        try:
            failed = isinstance(request, OneVisionError)
            sources.append(request if failed else engine.admit(request, tokenizer))
        except (RequestError, ContextOverflowError, OutOfMemoryError) as error:
            sources.append(error)
    active = [source for source in sources if isinstance(source, ActiveRequest)]
    if active:
        engine.submit(active)
    return [Stream(source, tokenizer) for source in sources]


class RequestBuilder:
    """Prepares prompts and conversations, with the caller's settings and the checkpoint's."""

    def __init__(
        self, processor: Processor, defaults: GenerationDefaults, has_draft: bool = False
    ) -> None:
        self._processor, self._defaults, self._has_draft = processor, defaults, has_draft
        self._grammars = Grammars(processor.tokenizer, defaults.eos_token_ids)

    @property
    def default_max_tokens(self) -> int:
        """Of an answer for which the caller sets no limit: the checkpoint's own limit, else 256."""
        limit = self._defaults.max_new_tokens
        return DEFAULT_MAX_TOKENS if limit is None else limit

    def compile_schema(
        self, schema: str | bool | Mapping[str, Any], check: Callable[[], None] = no_check
    ) -> Grammar:
        """See :meth:`Grammars.of`."""
        return self._grammars.of(schema, check)

    def build_request(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        messages: Messages | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        tiling: Tiling = "auto",
        order: Order = "template",
        visual_tokens: float | None = None,
        logprobs: int | None = None,
        json_schema: str | bool | Mapping[str, Any] | None = None,
        prompt_lookup: int = 0,
        draft_tokens: int = 0,
        check: Callable[[], None] = no_check,
    ) -> PromptRequest:
        """One conversation, read and tokenized; the settings are those of ``Options``."""
        if draft_tokens and not self._has_draft:
            raise RequestError("draft_tokens needs a draft model; load the model with draft_model")
        stops = (stop,) if isinstance(stop, str) else _listed(stop)
        if not callable(check):
            raise RequestError(f"check is a {type(check).__name__}; give a function")
        open_ended = max_tokens is None
        if max_tokens is None:
            max_tokens = self.default_max_tokens
        check_range("max_tokens", max_tokens)  # room for the answer decides about frames of videos
        defaults = self._defaults
        settings: dict[str, Any] = {"repetition_penalty": defaults.repetition_penalty, "seed": seed}
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        if defaults.do_sample or temperature:
            settings |= {name: getattr(defaults, name) for name in given}
        given["repetition_penalty"] = repetition_penalty
        given |= {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
        settings |= {name: value for name, value in given.items() if value is not None}
        settings = {name: value for name, value in settings.items() if value is not None}
        sampling = Sampling(**settings, logit_bias=logit_bias or {})
        started = time.perf_counter()
        grammar = None if json_schema is None else self.compile_schema(json_schema, check)
        inputs = self._processor.prepare(
            normalise_messages(
                prompt=prompt, images=images, videos=videos, messages=messages, system=system
            ),
            num_frames=num_frames,
            fps=fps,
            start=start,
            end=end,
            tiling=tiling,
            order=order,
            visual_tokens=visual_tokens,
            answer=max_tokens,
            check=check,
        )
        seconds = time.perf_counter() - started
        return PromptRequest(
            inputs,
            sampling,
            max_tokens,
            stops,
            seconds,
            grammar,
            logprobs,
            prompt_lookup,
            draft_tokens,
            open_ended,
        )


def _listed(stop: Any) -> Sequence[str]:
    """The stop strings; a caller may have given anything."""
    if stop is not None and not isinstance(stop, Sequence):
        raise RequestError(f"stop is a {type(stop).__name__}; give a text, or a list of texts")
    return tuple(cast(Sequence[str], stop or ()))
