"""How the tokens of one answer are chosen, and what is told of the choice; on the inference thread.

A ``Sampling``, and where they were asked for a schema that is kept to
and likelihoods that are told. An answer may be begun alone and go on in a batch: mlx-lm is then
given new functions, which continue where the old ones were.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mlx_onevision.errors import RequestError
from mlx_onevision.sampling.grammar import Grammar, Guide
from mlx_onevision.sampling.logprobs import Watch
from mlx_onevision.sampling.sampler import Sampling


class Chooser(Protocol):
    """What mlx-lm is given for an answer; see :class:`~mlx_onevision.sampling.sampler.Sampling`."""

    def sampler(self, drawn: int = 0) -> Callable[[Any], Any]: ...

    def logits_processors(
        self, vocab_size: int, stand_in: int, before: Sequence[int] = ()
    ) -> list[Callable[[Any, Any], Any]]: ...


class Choosing:
    """grammar : the schema that the answer keeps to. watch : takes the tokens' likelihoods."""

    def __init__(
        self, sampling: Sampling, grammar: Grammar | None = None, watch: Watch | None = None
    ) -> None:
        self._sampling, self._grammar, self._watch = sampling, grammar, watch
        self._guide: Guide | None = None
        self._said: list[int] = []

    def sampler(self, drawn: int = 0) -> Callable[[Any], Any]:
        sampler = self._sampling.sampler(drawn)
        return sampler if self._watch is None else self._watch.sampler(sampler)

    def logits_processors(
        self, vocab_size: int, stand_in: int, before: Sequence[int] = ()
    ) -> list[Callable[[Any, Any], Any]]:
        processors = self._sampling.logits_processors(vocab_size, stand_in, before)
        if self._grammar is None:
            return processors
        self._guide = self._grammar.guide(self._said)
        return [*processors, self._guide]  # the last word: nothing may change what it rules out

    def chosen(self, token: int) -> None:
        """mlx-lm has chosen a token, which is about to be handed on.

        Raises:
            RequestError: where the schema could not be followed any further.
        """
        if self._watch is not None:
            self._watch.note()
        if self._guide is not None:
            if self._guide.failure is not None:
                raise RequestError(
                    f"the JSON schema became too complex to follow ({self._guide.failure}); "
                    "simplify it"
                )
            self._said.append(token)

    def end(self) -> None:
        """The answer has ended."""
        self._guide = None
        if self._watch is not None:
            self._watch.end()
