"""A model that tells what a film shows: asked about frames, or about captions alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.engine.engine import Engine
from mlx_onevision.engine.generation import Question, Stream, ask
from mlx_onevision.errors import ContextOverflowError
from mlx_onevision.media.anyres import video_tokens
from mlx_onevision.prompt.processor import Processor

LONGEST_READING = 8192
"""Tokens of captions that are read at once, even where more would fit: that bounds memory."""

Tiles = NDArray[np.uint8]


Prepare = Callable[..., Question]
"""Makes a question of a prompt, ``videos`` and settings by their names."""


class Narrator:
    """Asks a loaded model, one question at a time, and keeps no frames of what it was asked about:
    a film does not come back to them.

    settings : of every answer, by the names in :class:`~mlx_onevision.engine.options.Options`.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        prepare: Prepare,
        settings: Mapping[str, Any],
    ) -> None:
        self._engine, self._processor = engine, processor
        self._prepare, self._settings = prepare, settings
        self.size = processor.video_config.pixels.size
        """Pixels along a side of a tile."""

    def ask(self, question: str, max_tokens: int, tiles: Tiles | None = None) -> Stream:
        """Starts an answer; about frames, where there are ``tiles`` of them (n, size, size, 3).

        Raises:
            RequestError: for a setting out of range.
            ContextOverflowError: for more than the model's context holds.
        """
        prepared = self._question(question, max_tokens, tiles)
        stream = ask(self._engine, self._processor.tokenizer, prepared)
        if tiles is not None:
            self._engine.forget(prepared.inputs)  # once the answer is there
        return stream

    def check(self, question: str, max_tokens: int, num_frames: int) -> None:
        """Raises what asking about so many frames would raise."""
        length = len(self._question(question, max_tokens, None).inputs.input_ids)
        patches = self._engine.config.vision_config.patches_per_side
        length += video_tokens(num_frames, patches)
        limit = self._engine.config.text_config.max_position_embeddings
        if length >= limit:
            raise ContextOverflowError(
                f"{num_frames} frames of a segment take {length} tokens with the question, but the "
                f"model's context holds {limit}; use fewer frames"
            )

    def fits(self, question: str, max_tokens: int) -> bool:
        """Whether a question about words can be read at once, and answered."""
        length = len(self._question(question, max_tokens, None).inputs.input_ids)
        limit = self._engine.config.text_config.max_position_embeddings
        return length + max_tokens <= min(limit, LONGEST_READING)

    def _question(self, question: str, max_tokens: int, tiles: Tiles | None) -> Question:
        videos = [] if tiles is None else [tiles]
        return self._prepare(question, videos=videos, max_tokens=max_tokens, **self._settings)
