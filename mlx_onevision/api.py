"""The library's face: a model that is loaded once and asked often, from any thread."""

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_onevision import hub
from mlx_onevision.config import OneVisionConfig
from mlx_onevision.embedding import Embedder, Item, Vector
from mlx_onevision.engine import Engine
from mlx_onevision.errors import OneVisionError
from mlx_onevision.generation import Generation, Stream
from mlx_onevision.identity import identify
from mlx_onevision.image import ImageSource
from mlx_onevision.messages import normalise_messages
from mlx_onevision.processor import Inputs, Processor, Tiling
from mlx_onevision.sampling import Sampling
from mlx_onevision.vectors import Embeddings

Messages = Sequence[Mapping[str, Any]]


def load(
    model: str | Path = "demo", *, revision: str | None = None, dtype: str | None = None
) -> "Model":
    """Opens a LLaVA-OneVision checkpoint. Weights are mapped, and read when they are first used.

    model : a folder, a Hub id, a size (``0.5b``, ``7b``, ``72b``), or ``demo``: the small model
        that comes with this package and knows coloured shapes.
    revision : branch, tag or commit, for a model of the Hub.
    dtype : ``float16``, ``bfloat16`` or ``float32``; None keeps the checkpoint's own.

    Raises:
        OneVisionError: saying in one sentence what is missing or not supported.
    """
    return Model(hub.resolve(model, revision=revision), name=str(model), dtype=dtype)


class Model:
    """A loaded checkpoint. Its weights live on a thread of their own; use it from any thread."""

    def __init__(self, folder: Path, *, name: str | None = None, dtype: str | None = None) -> None:
        self.path = folder
        self.name = name or str(folder)
        self._engine = Engine(folder, dtype=dtype)
        self._processor = Processor.from_folder(folder, self._engine.config)

    @property
    def config(self) -> OneVisionConfig:
        return self._engine.config

    def generate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        messages: Messages | None = None,
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Answers one prompt about pictures, or one conversation; see :meth:`stream`."""
        return self.stream(
            prompt,
            images=images,
            messages=messages,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        ).result()

    def stream(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        messages: Messages | None = None,
        system: str | None = None,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Stream:
        """Starts an answer and returns it as a stream of text.

        prompt, images, system : the question, the pictures that it is about (paths, URLs, bytes,
        PIL
            images or uint8 arrays), and instructions that stand before it.
        messages : a whole conversation instead, as a list of {"role", "content"}; content is text
        or
            a list of {"type": "text" | "image", ...} as the reference takes them.
        max_tokens : the answer's length at most; the context may end it earlier.
        temperature, top_p, top_k, min_p, repetition_penalty, seed : see :class:`sampling.Sampling`.
            None takes what the checkpoint's generation_config.json says, which for the published
            ones is greedy.
        stop : a text, or texts, at which the answer ends; they are not part of it.

        Raises:
            RequestError: for an empty prompt or a number out of range.
            MediaError: for a picture that cannot be read.
            ContextOverflowError: for a prompt beyond the model's context.
        """
        sampling = self._sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        started = time.perf_counter()
        inputs = self._processor.prepare(
            normalise_messages(prompt=prompt, images=images, messages=messages, system=system)
        )
        return Stream(
            self._engine,
            self._processor.tokenizer,
            inputs,
            sampling,
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            prepare_seconds=time.perf_counter() - started,
        )

    def render(self, messages: Messages) -> str:
        """The prompt text that the chat template makes of a conversation, placeholders
        unexpanded.
        """
        return self._processor.render(messages)

    def prepare(self, messages: Messages) -> Inputs:
        """Token ids (L,) as the reference makes them, and the pixel tiles of each medium."""
        return self._processor.prepare(messages)

    def logits(self, inputs: Inputs) -> np.ndarray:
        """Logits of every position of a prepared prompt, float32 (L, vocab_size)."""
        return self._engine.logits(inputs)

    def embed(
        self,
        items: Iterable[Item],
        space: str = "vision",
        *,
        normalize: bool = True,
        tiling: Tiling = "auto",
        cache: MutableMapping[str, Vector] | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_error: Callable[[int, OneVisionError], None] | None = None,
    ) -> Embeddings:
        """One vector for each item, float32.

        items : pictures (paths, URLs, bytes, PIL images or uint8 arrays), or typed blocks such as
            {"type": "text", "text": ...}; in the joint space, a list of pictures is one item.
        space : ``vision`` is for pictures that look alike, and knows no text. ``joint`` holds text
            and pictures in one space, and is experimental. See :attr:`Embeddings.note`.
        normalize : to length 1.
        tiling : how the joint space sees pictures, as in a conversation; "never" is a tenth of the
            work for a large one. Vectors of different tilings are not comparable.
        cache : where vectors are looked up by content and kept; any mapping will do.
        progress : called with how many items are done, and of how many.
        on_error : called with the index of an item that cannot be embedded, which is left out then.

        Raises:
            OneVisionError: for the first item that cannot be embedded, by its number, unless there
                is ``on_error``.
        """
        name, revision = self._identity
        embedder = Embedder(
            self._engine,
            self._processor,
            space=space,
            model=name,
            revision=revision,
            normalize=normalize,
            tiling=tiling,
        )
        return embedder.embed(items, cache=cache, progress=progress, on_error=on_error)

    @cached_property
    def _identity(self) -> tuple[str, str]:
        return identify(self.path)

    def close(self) -> None:
        """Cancels what is under way and frees the weights. A forgotten model closes itself."""
        self._engine.close()

    def _sampling(self, *, seed: int | None, **given: Any) -> Sampling:
        """What the caller gave, over what the checkpoint's generation_config.json says."""
        defaults = self._engine.defaults
        chosen: dict[str, Any] = {"repetition_penalty": defaults.repetition_penalty}
        if defaults.do_sample or given["temperature"]:
            chosen |= {
                name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k", "min_p")
            }
        chosen = {name: value for name, value in chosen.items() if value is not None}
        chosen |= {name: value for name, value in given.items() if value is not None}
        return Sampling(seed=seed, **chosen)
