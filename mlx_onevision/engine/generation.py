"""Conversations answered: tokens to text, as a stream or as a whole."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.engine.engine import Engine, TokenStream
from mlx_onevision.engine.request import Request
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.media.image import ImageSource
from mlx_onevision.media.video import VideoSource, no_check
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Order, Processor, Tiling
from mlx_onevision.prompt.tokenizer import Tokenizer
from mlx_onevision.sampling.detokenizer import Detokenizer, StopStrings
from mlx_onevision.sampling.grammar import Grammar, Grammars
from mlx_onevision.sampling.logprobs import LogprobRecorder, Telling, TokenLogprob, plain
from mlx_onevision.sampling.sampler import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, eq=False)
class PromptRequest:
    """A prepared conversation, and how to answer it.

    grammar : the schema that the answer keeps to.
    logprobs : see :class:`~mlx_onevision.engine.options.Options`.

    Raises:
        RequestError: for a max_tokens below 1, logprobs out of range, and for a stop string that is
            none.
    """

    inputs: Inputs
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()
    prepare_seconds: float = 0.0
    grammar: Grammar | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise RequestError(
                f"max_tokens must be a whole number, 1 or more, not {self.max_tokens!r}"
            )
        StopStrings(self.stop)
        if self.logprobs is not None:
            LogprobRecorder(self.logprobs)


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
        context was used up), ``cancelled``, or, for a row of a batch, ``error``.
    notes : what of the videos was not used as it was asked for, a sentence each.
    error : what went wrong with this row of a batch; ``text`` is what had come until then.
    logprobs : where they were asked for, of every token that the text is made of; see
        :class:`~mlx_onevision.sampling.logprobs.Telling`.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    notes: tuple[str, ...] = ()
    error: OneVisionError | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

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
            values["logprobs"] = plain(self.logprobs)
        if self.error is not None:
            values["error"] = {"code": self.error.code, "message": str(self.error)}
        return values


class Stream:
    """An answer on its way: an iterator of pieces of text, whole characters each.

    The pieces joined are :attr:`Generation.text`. An abandoned stream cancels itself.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        question: PromptRequest | None,
        source: TokenStream,
        watch: LogprobRecorder | None = None,
    ) -> None:
        self._eos = engine.defaults.eos_token_ids
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._result: Generation | None = None
        self._error: OneVisionError | None = None
        self._question = question
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(question.stop if question else ())
        self._telling = None if watch is None else Telling(watch, tokenizer)
        self._source = source
        self._text = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._text)

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """Where they were asked for, those of the tokens that the pieces so far are made of. It has
        grown when a piece comes.
        """
        return () if self._telling is None else self._telling.told

    def cancel(self) -> None:
        """Ends the answer before its next token; what has come so far is its result."""
        self._source.cancel()

    def result(self) -> Generation:
        """The whole answer, waited for. Raises what ended it, if something did."""
        for _ in self._text:
            pass
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise RequestError("the answer failed while it was streamed; ask again")
        return self._result

    def outcome(self) -> Generation:
        """As :meth:`result`, but what this package refuses to do is in ``error`` of what it
        returns.
        """
        try:
            return self.result()
        except OneVisionError as error:
            return self._generation("error", error)

    def _run(self) -> Iterator[str]:
        try:
            yield from self._pieces_of_text()
        except OneVisionError as error:
            self._error = error
            raise

    def _pieces_of_text(self) -> Iterator[str]:
        finish: FinishReason | None = None
        decoded = shown = 0  # characters
        try:
            for token in self._source:
                self._tokens.append(token)
                if token in self._eos:
                    finish = "stop"
                    continue  # the engine ends by itself, and fills in the counters
                if finish is None:
                    if self._telling is not None:
                        self._telling.add(decoded)
                    text = self._detokenizer.add(token)
                    decoded += len(text)
                    piece = self._stop.add(text)
                    if piece:
                        shown += len(piece)
                        yield self._shown(piece, shown)
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
                yield self._shown(piece, shown + len(piece))
        if finish is None:
            finish = "cancelled" if self._source.interrupted else "length"
        self._result = self._generation(finish)

    def _shown(self, piece: str, length: int) -> str:
        """A piece that is about to be given out, and ends at ``length`` characters."""
        self._pieces.append(piece)
        if self._telling is not None:
            self._telling.show(length)
        return piece

    def _generation(self, finish: FinishReason, error: OneVisionError | None = None) -> Generation:
        counters, question = self._source.counters, self._question
        media = question.inputs.media if question else ()
        return Generation(
            text="".join(self._pieces),
            tokens=tuple(self._tokens),
            finish_reason=finish,
            error=error,
            usage=Usage(
                prompt_tokens=counters.prompt_tokens,
                cached_tokens=counters.cached_tokens,
                media_tokens=sum(medium.tokens for medium in media),
                encoded_media=counters.encoded_media,
                completion_tokens=len(self._tokens),
                prepare_seconds=question.prepare_seconds if question else 0.0,
                import_seconds=counters.import_seconds,
                encode_seconds=counters.encode_seconds,
                prefill_seconds=counters.prefill_seconds,
                decode_seconds=counters.decode_seconds,
                peak_memory_bytes=counters.peak_memory,
            ),
            notes=question.inputs.notes if question else (),
            logprobs=None if self._telling is None else tuple(self._telling.told),
        )


def ask(engine: Engine, tokenizer: Tokenizer, question: PromptRequest) -> Stream:
    """Starts one answer. Raises ContextOverflowError for a prompt beyond the model's context."""
    request = _request(question, tokenizer)
    return Stream(engine, tokenizer, question, engine.generate(request), request.watch)


def ask_all(
    engine: Engine, tokenizer: Tokenizer, questions: Sequence[PromptRequest | OneVisionError]
) -> list[Stream]:
    """Starts answers that run together, one for each question, in order. A question that failed
    while it was prepared has a stream that raises its error, as has one beyond the context.
    """
    asked = [_request(q, tokenizer) for q in questions if isinstance(q, PromptRequest)]
    started = zip(engine.generate_batch(asked), asked, strict=True)
    streams: list[Stream] = []
    for question in questions:
        if isinstance(question, PromptRequest):
            source, request = next(started)
            streams.append(Stream(engine, tokenizer, question, source, request.watch))
        else:
            streams.append(Stream(engine, tokenizer, None, engine.failed(question)))
    return streams


def _request(question: PromptRequest, tokenizer: Tokenizer) -> Request:
    return Request(
        question.inputs,
        question.sampling,
        question.max_tokens,
        _StopWatch(tokenizer, question.stop) if question.stop else lambda _: False,
        question.grammar,
        None if question.logprobs is None else LogprobRecorder(question.logprobs),
    )


class _StopWatch:
    """Sees a stop string on the inference thread, which then need not wait to be told: nobody may
    be reading yet.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(stop)

    def __call__(self, token: int) -> bool:
        self._stop.add(self._detokenizer.add(token))
        return self._stop.found is not None


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count > 0 and seconds > 0 else 0.0


# What was asked, and how to answer it, as one ``PromptRequest``.

Messages = Sequence[Mapping[str, Any]]


class Questions:
    """Reads prompts and conversations, with the settings of whoever asks and the checkpoint's."""

    def __init__(self, processor: Processor, defaults: GenerationDefaults) -> None:
        self._processor, self._defaults = processor, defaults
        self._grammars = Grammars(processor.tokenizer, defaults.eos_token_ids)

    def grammar(
        self, schema: str | bool | Mapping[str, Any], check: Callable[[], None] = no_check
    ) -> Grammar:
        """See :meth:`~mlx_onevision.sampling.grammar.Grammars.of`."""
        return self._grammars.of(schema, check)

    def __call__(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        messages: Messages | None = None,
        system: str | None = None,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        tiling: Tiling = "auto",
        order: Order = "template",
        logprobs: int | None = None,
        json_schema: str | bool | Mapping[str, Any] | None = None,
        check: Callable[[], None] = no_check,
    ) -> PromptRequest:
        """One row, read and tokenized; the defaults of ``Options``."""
        sampling = self._sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        started = time.perf_counter()
        grammar = None if json_schema is None else self.grammar(json_schema, check)
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
            answer=max_tokens,
            check=check,
        )
        return PromptRequest(
            inputs,
            sampling,
            max_tokens,
            (stop,) if isinstance(stop, str) else tuple(stop),
            time.perf_counter() - started,
            grammar,
            logprobs,
        )

    def _sampling(self, *, seed: int | None, **given: Any) -> Sampling:
        """What the caller gave, over what the checkpoint's generation_config.json says."""
        defaults = self._defaults
        chosen: dict[str, Any] = {"repetition_penalty": defaults.repetition_penalty}
        if defaults.do_sample or given["temperature"]:
            chosen |= {
                name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "min_p")
            }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        chosen |= {name: value for name, value in given.items() if value is not None}
        return Sampling(seed=seed, **chosen)
