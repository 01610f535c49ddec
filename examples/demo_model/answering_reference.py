"""Answers through transformers, from the same files, with its own processor. Needs torchvision."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

with contextlib.suppress(ImportError):
    from parity import torchvision_ops  # noqa: F401  with tests on the path: a CUDA wheel on a CPU
from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

from examples.demo_model.answering import LONGEST, conversation
from examples.demo_model.cases import PromptRequest
from mlx_onevision.checkpoint import hub


class Reference:
    """A model loaded by transformers."""

    def __init__(self, model: str, dtype: str | None = None) -> None:
        folder = hub.resolve(model)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, dtype=dtype or "auto"
        )
        self._pictures: list[Image.Image] = []
        self._video = False

    def look(self, paths: list[Path], video: bool) -> None:
        self._pictures = [Image.open(path).convert("RGB") for path in paths]
        self._video = video

    @torch.no_grad()
    def answer(self, question: PromptRequest) -> str:
        media = [{"type": "video"}] if self._video else [{"type": "image"} for _ in self._pictures]
        messages = conversation(question, media)
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        if self._video:
            frames = np.stack([np.asarray(picture) for picture in self._pictures])
            given = {"videos": [frames], "do_sample_frames": False}
        else:
            given = {"images": [self._pictures]} if self._pictures else {}
        inputs = self.processor(text=[prompt], **given, return_tensors="pt").to(self.model.dtype)
        said = self.model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        fresh = said[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(fresh, skip_special_tokens=True)
