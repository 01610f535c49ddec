"""The library's face: a model that is loaded once and asked often, from any thread."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_onevision import hub
from mlx_onevision.config import OneVisionConfig
from mlx_onevision.engine import Engine
from mlx_onevision.generation import Generation, Stream
from mlx_onevision.image import ImageSource
from mlx_onevision.messages import normalise_messages
from mlx_onevision.processor import Inputs, Order, Processor, Tiling
from mlx_onevision.sampling import Sampling
from mlx_onevision.video import VideoSource

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
        videos: Sequence[VideoSource] = (),
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
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        tiling: Tiling = "auto",
        order: Order = "template",
    ) -> Generation:
        """Answers one prompt about pictures and videos, or one conversation; see :meth:`stream`."""
        return self.stream(
            prompt,
            images=images,
            videos=videos,
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
            num_frames=num_frames,
            fps=fps,
            start=start,
            end=end,
            tiling=tiling,
            order=order,
        ).result()

    def stream(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
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
        num_frames: int | None = None,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        tiling: Tiling = "auto",
        order: Order = "template",
    ) -> Stream:
        """Starts an answer and returns it as a stream of text.

        prompt, images, videos, system : the question, what it is about (images: paths, URLs, bytes,
            PIL images or uint8 arrays; videos: paths, URLs, bytes, lists of frames or uint8 arrays
            (T, H, W, C)), and instructions that stand before it.
        messages : a whole conversation instead, as a list of {"role", "content"}; content is text
            or a list of {"type": "text" | "image" | "video", ...} as the reference takes them.
            Blocks without a source take theirs from ``images`` and ``videos``.
        max_tokens : the answer's length at most; the context may end it earlier.
        temperature, top_p, top_k, min_p, repetition_penalty, seed : see :class:`sampling.Sampling`.
            None takes what the checkpoint's generation_config.json says, which for the published
            ones is greedy.
        stop : a text, or texts, at which the answer ends; they are not part of it.
        num_frames, fps, start, end : which frames of each video, see
            :class:`frames.FrameOptions`. Of a file it is 32, evenly spread, unless they say
            otherwise, or fewer where the context holds fewer.
        tiling : "auto" cuts an image into tiles when it is alone in the conversation, "always" and
            "never" say so for every image.
        order : "template" puts the media of a message in front of its words, as the reference does;
            "given" keeps them where they stand between the words.

        Raises:
            RequestError: for an empty prompt or a number out of range.
            MediaError: for a picture or a video that cannot be read.
            ContextOverflowError: for a prompt, or more frames, beyond the model's context.
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

    def render(self, messages: Messages, order: Order = "template") -> str:
        """The prompt text that the chat template makes of a conversation, placeholders
        unexpanded.
        """
        return self._processor.render(messages, order)

    def prepare(self, messages: Messages, **options: Any) -> Inputs:
        """Token ids (L,) as the reference makes them, and the pixel tiles of each medium.

        options : ``images``, ``videos``, ``tiling``, ``order``, ``num_frames``, ``fps``, ``start``,
            ``end``; see :meth:`processor.Processor.prepare`.
        """
        return self._processor.prepare(messages, **options)

    def logits(self, inputs: Inputs) -> np.ndarray:
        """Logits of every position of a prepared prompt, float32 (L, vocab_size)."""
        return self._engine.logits(inputs)

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
