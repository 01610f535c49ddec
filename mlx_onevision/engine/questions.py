"""What was asked, and how to answer it, as one ``Question``."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.engine.generation import Question
from mlx_onevision.media.image import ImageSource
from mlx_onevision.media.video import VideoSource, nothing
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Order, Processor, Tiling
from mlx_onevision.sampling.grammar import Grammar, Grammars
from mlx_onevision.sampling.sampler import Sampling

Messages = Sequence[Mapping[str, Any]]


class Questions:
    """Reads prompts and conversations, with the settings of whoever asks and the checkpoint's."""

    def __init__(self, processor: Processor, defaults: GenerationDefaults) -> None:
        self._processor, self._defaults = processor, defaults
        self._grammars = Grammars(processor.tokenizer, defaults.eos_token_ids)

    def grammar(
        self, schema: str | bool | Mapping[str, Any], check: Callable[[], None] = nothing
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
        check: Callable[[], None] = nothing,
    ) -> Question:
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
        return Question(
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
