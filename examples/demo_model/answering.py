"""Answers through `mlx_onevision`, as its users get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from examples.demo_model.cases import PromptRequest
from examples.demo_model.packing import PATCHES
from examples.demo_model.tiling import CONFIG
from examples.demo_model.words import END, VIDEO
from mlx_onevision import Inputs, load
from mlx_onevision.media.anyres import VideoPacking
from mlx_onevision.media.resize import resize
from mlx_onevision.prompt.processor import Medium

LONGEST = 120  # tokens of an answer
VIDEO_FILES = (".mp4", ".gif")


class Package:
    """A model loaded by this package; its other settings are the default ones."""

    def __init__(self, model: str, dtype: str | None = None, visual_tokens: float = 1.0) -> None:
        self.model = load(model, dtype=dtype, visual_tokens=visual_tokens)
        self._words = Tokenizer.from_file(str(self.model.path / "tokenizer.json"))
        self._paths: list[Path] = []
        self._video: Medium | None = None
        self._kind = "image"

    def look(self, paths: list[Path], video: bool) -> None:
        self._paths, self._video = paths, None
        self._kind = "image"
        if video and paths[0].suffix in VIDEO_FILES:
            self._kind = "video"
        elif video:
            frames = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
            tiles = np.stack([resize(frame, (CONFIG.size, CONFIG.size)) for frame in frames])
            packing = VideoPacking(PATCHES)
            rows = packing.tokens(len(tiles))
            self._video = Medium("video", tiles, None, packing, rows, CONFIG)

    def answer(self, question: PromptRequest) -> str:
        if self._video:
            return self._answer_video(question, self._video)
        media = [{"type": self._kind, "path": str(path)} for path in self._paths]
        return self.model.generate(messages=conversation(question, media), max_tokens=LONGEST).text

    def _answer_video(self, question: PromptRequest, video: Medium) -> str:
        prompt = self.model.render(conversation(question, [{"type": "video"}]))
        ids = self._encode(prompt)
        mark = ids.index(self._encode(VIDEO)[0])
        ids[mark : mark + 1] = [ids[mark]] * video.tokens
        right = self._encode(question.answer + END)
        if self._next(ids + right[:-1], video, len(right)) == right:
            return question.answer
        answer: list[int] = []
        while len(answer) < LONGEST and answer[-1:] != self._encode(END):
            answer += self._next(ids + answer, video, 1)
        return self._words.decode(answer)

    def _encode(self, text: str) -> list[int]:
        return self._words.encode(text, add_special_tokens=False).ids

    def _next(self, ids: list[int], video: Medium, count: int) -> list[int]:
        """The likeliest token behind each of the last `count` ids."""
        logits = self.model.logits(Inputs(np.asarray(ids, np.int32), (video,), ""))
        return logits[-count:].argmax(-1).tolist()


def conversation(question: PromptRequest, media: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages: the media and the first question, then its answer and the next question."""
    messages: list[dict[str, Any]] = []
    for asked, answered in question.history:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
    messages[0]["content"] = [*media, *messages[0]["content"]]
    return messages
