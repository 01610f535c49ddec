# pyright: reportUnknownMemberType=false
"""Sampling settings, and the samplers and logits processors that mlx-lm is given for them."""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.grammar import Grammar, Guide
from mlx_onevision.sampling.logprobs import LogprobRecorder
from mlx_onevision.sampling.ranges import MOST_BIAS, Range, check_range

Processor = Callable[[Any, Any], Any]

GREEDY = 1e-5  # a temperature or top_p below this is greedy
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. They act in the order of transformers' logits processors and warpers
    (generation/logits_process.py): biases, penalties, temperature, top_k, top_p, min_p, each on
    what the one before has left.

    Raises RequestError for a number out of range.

    temperature : 0 and up; divides the logits. 0 is greedy: the likeliest token, ties to the lower
        id.
    top_k : the k most likely tokens, and those as likely as the last of them; 0 for all.
    top_p : in (0, 1]; the smallest set of tokens with this much probability.
    min_p : in [0, 1]; tokens at least this likely, relative to the most likely one.
    repetition_penalty : above 0; divides positive logits of tokens that the prompt or the answer
        holds, and multiplies negative ones. 1 changes nothing.
    presence_penalty, frequency_penalty : -2 to 2; subtracted from the logits of tokens that the
        answer holds, once, and as often as it holds them.
    logit_bias : -100 to 100, by token id; added to logits.
    seed : makes a sampled answer repeatable.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "top_k", "min_p", *PENALTIES):
            check_range(name, getattr(self, name))
        if not _is_mapping(self.logit_bias):
            raise RequestError("logit_bias must be a mapping from token ids to numbers")
        for token, bias in self.logit_bias.items():
            check_bias(token, bias)
        if self.seed is not None:
            check_range("seed", self.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always chosen. A temperature or top_p near 0 has that
        effect, too, but would overflow float32.
        """
        return self.temperature < GREEDY or self.top_p < GREEDY

    def sampler(self, drawn: int = 0) -> Callable[[Any], Any]:
        """A function from logprobs (B, vocab_size) to ids (B,), for one answer.

        drawn : how many tokens of the answer were drawn before; the random key continues there.

        Every answer has a random key of its own (mlx-lm's samplers share one state), so that a seed
        gives the same answer alone and in a batch.
        """
        import mlx.core as mx
        from mlx_lm.sample_utils import greedy_sampler

        if self.is_greedy:
            return greedy_sampler
        key = mx.random.key(secrets.randbits(64) if self.seed is None else self.seed)
        one = _draw()
        for _ in range(drawn):
            key, _ = mx.random.split(key)
            mx.eval(key)

        def draw(logprobs: mx.array) -> mx.array:
            nonlocal key
            key, token = one(self.filtered(logprobs), key)
            return token

        return draw

    def filtered(self, logprobs: Any) -> Any:
        """The logits (B, vocab_size) that tokens are drawn from: ``logprobs`` of the same shape
        after temperature and filters.
        """
        import mlx.core as mx
        from mlx_lm.sample_utils import apply_min_p, apply_top_p

        scores = logprobs * mx.array(1 / self.temperature)
        if 0 < self.top_k < scores.shape[-1]:
            least = mx.min(mx.topk(scores, self.top_k), axis=-1, keepdims=True)
            scores = mx.where(scores < least, -mx.inf, scores)
        if self.top_p < 1:  # normalized again, or a temperature makes probabilities too small
            scores = apply_top_p(scores - mx.logsumexp(scores, axis=-1, keepdims=True), self.top_p)
        return apply_min_p(scores, self.min_p) if self.min_p > 0 else scores

    @property
    def changes_logits(self) -> bool:
        """Whether settings may change a greedy answer."""
        return bool(self.logit_bias) or self.repetition_penalty != 1 or self.penalizes_answer

    @property
    def penalizes_answer(self) -> bool:
        """Whether a penalty depends on the tokens of the answer."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def logits_processors(
        self, vocab_size: int, prompt: Iterable[int], answer: Sequence[int] = ()
    ) -> list[Processor]:
        """Logits processors for mlx-lm: functions of ids (L,) and logits (1, vocab_size).

        prompt : its ids, with placeholders in place of virtual ids, as in the reference. mlx-lm's
            own list will not do: its virtual ids are beyond the logits, and ids in a KV cache may
            be missing.
        answer : the ids that were generated before; later ones are those that mlx-lm adds.
        """
        if not self.changes_logits:
            return []
        from mlx_lm.sample_utils import make_logits_processors

        # mlx-lm takes an empty mapping for none.
        processors = make_logits_processors(logit_bias=dict(self.logit_bias))
        if self.repetition_penalty != 1:
            processors.append(self._repetition(vocab_size, prompt))
        if self.penalizes_answer:
            processors.append(self._repetition_in_answer(answer))
        return processors

    def _repetition_in_answer(self, answer: Sequence[int]) -> Processor:
        import mlx.core as mx
        from mlx_lm.sample_utils import make_logits_processors

        everything = 1 << 30
        penalties: list[Processor] = make_logits_processors(
            presence_penalty=self.presence_penalty,
            presence_context_size=everything,
            frequency_penalty=self.frequency_penalty,
            frequency_context_size=everything,
        )
        known, before = mx.array(list(answer), mx.int32), None

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal before
            before = len(tokens) if before is None else before
            text = mx.concatenate([known, tokens[before:].astype(mx.int32)])
            for penalize in penalties:
                logits = penalize(text, logits)
            return logits

        return process

    def _repetition(self, vocab_size: int, prompt: Iterable[int]) -> Processor:
        import mlx.core as mx
        from mlx_lm.sample_utils import make_repetition_penalty

        # The whole prompt and answer, as in the reference; mlx-lm's own default is the last 20.
        penalize = cast("Processor", make_repetition_penalty(self.repetition_penalty, 1 << 30))
        known = mx.array(sorted({int(token) for token in prompt}), mx.int32)

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            # An id that is there twice is penalized once.
            tokens = tokens.astype(mx.int32)
            text = mx.where(tokens < vocab_size, tokens, known[0])
            return penalize(mx.concatenate([known, text]), logits)

        return process


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def check_bias(token: object, bias: object) -> None:
    """Raises RequestError for an invalid token id or bias."""
    if type(token) is not int or token < 0:
        raise RequestError(f"logit_bias has {token!r}, which is no token id; give whole numbers")
    if not isinstance(bias, int | float) or not Range(ge=-MOST_BIAS, le=MOST_BIAS).holds(bias):
        raise RequestError(f"the logit_bias of token {token} must be -100 to 100, not {bias!r}")


@cache
def _draw() -> Callable[[Any, Any], tuple[Any, Any]]:
    """A compiled function that draws ids (B,) from logits (B, vocab_size) with a random key, and
    returns the next key, too.
    """
    import mlx.core as mx

    def draw(scores: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
        key, now = mx.random.split(key)
        return key, mx.random.categorical(scores, key=now)

    return mx.compile(draw)


class RequestSampler:
    """Sampler, logits processors and logprobs of one request, on the inference thread. For a
    request that is moved into a batch, new functions continue where the old ones ended.
    """

    def __init__(
        self,
        sampling: Sampling,
        grammar: Grammar | None = None,
        recorder: LogprobRecorder | None = None,
    ) -> None:
        self._sampling, self._grammar, self._recorder = sampling, grammar, recorder
        self._guide: Guide | None = None
        self._accepted: list[int] = []

    @property
    def needs_logprobs(self) -> bool:
        """Whether the sampler needs normalized logprobs; a greedy choice that is not recorded takes
        logits as well.
        """
        return self._recorder is not None or not self._sampling.is_greedy

    def sampler(self, drawn: int = 0) -> Callable[[Any], Any]:
        """As :meth:`Sampling.sampler`, recorded where logprobs are wanted."""
        sampler = self._sampling.sampler(drawn)
        return sampler if self._recorder is None else self._recorder.sampler(sampler)

    def logits_processors(self, vocab_size: int, prompt: Iterable[int]) -> list[Processor]:
        """As :meth:`Sampling.logits_processors`, and that of the schema."""
        processors = self._sampling.logits_processors(vocab_size, prompt, self._accepted)
        if self._grammar is None:
            return processors
        self._guide = self._grammar.guide(self._accepted)
        return [*processors, self._guide]  # last, so that no other changes what it rules out

    def accept_token(self, token: int) -> None:
        """Continues with a token that was generated. Raises RequestError where the schema could not
        be followed any further.
        """
        if self._recorder is not None:
            self._recorder.record()
        if self._guide is not None:
            if self._guide.failure is not None:
                raise RequestError(
                    f"the JSON schema became too complex to follow ({self._guide.failure}); "
                    "simplify it"
                )
        if self._guide is not None or self._sampling.penalizes_answer:
            self._accepted.append(token)

    def end(self) -> None:
        """Drops what belongs to the last functions."""
        self._guide = None
        if self._recorder is not None:
            self._recorder.end()
