"""A backend of the tests that can all there is: it keeps what it was asked, and says how likely its
words were.
"""

from collections.abc import Sequence
from dataclasses import replace

from mlx_onevision.plugins.adapters.fake import FakeBackend
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.results import (
    GenerateResult,
    ModelInfo,
    TextEvent,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream

WORDS = ("a ", "é", " b")


class Telling(FakeBackend):
    """words : the answer, a token each."""

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.asked: list[GenerateRequest] = []
        self.words = tuple(words)
        super().__init__()

    def info(self) -> ModelInfo:
        known = super().info()
        able = dict.fromkeys((*known.capabilities, "logprobs", "json_schema"))
        return replace(known, capabilities=tuple(able))

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        self.asked.append(request)
        return super().generate(request)

    def _load(self) -> "Telling._Told":
        return Telling._Told(self)

    class _Told(FakeBackend._Model):
        def __init__(self, owner: "Telling") -> None:
            super().__init__(owner)
            self._words = owner.words

        def generate(self, request: GenerateRequest, channel: Channel) -> GenerateResult:
            said = self._words[: request.max_tokens]
            told = [_token(word, request.logprobs) for word in said]
            for word, token in zip(said, told, strict=True):
                channel.put(TextEvent(word, logprobs=(token,) if token else ()))
            tokens = tuple(token for token in told if token)
            return GenerateResult(
                "".join(said),
                "stop" if said == self._words else "length",
                Usage(prompt_tokens=7, completion_tokens=len(said)),
                logprobs=None if request.logprobs is None else tokens,
            )


def _token(word: str, top: int | None) -> TokenLogprob | None:
    if top is None:
        return None
    others = [TopLogprob(f"{word}{n}", f"{word}{n}".encode(), -1.0 - n) for n in range(top)]
    return TokenLogprob(word, word.encode(), -0.25, tuple(others))
