"""lmms-eval's own ``llava_onevision``, asked what it would give the network: the class is the real
one, and around it stand in for LLaVA-NeXT, decord and a checkpoint what only hands values through.
"""

# pyright: reportMissingImports=false
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from parity.torchvision_ops import torchvision  # noqa: F401  before transformers

from lmms_eval.api.instance import Instance  # isort: skip
from lmms_eval.api.model import CacheHook  # isort: skip


class Conversation:
    """What LLaVA-NeXT has under ``conv_templates["qwen_1_5"]``, with its ``get_prompt``."""

    system = "<|im_start|>system\nYou are a helpful assistant."
    roles = ("<|im_start|>user", "<|im_start|>assistant")
    sep = "<|im_end|>"
    sep_style = "CHATML"

    def __init__(self) -> None:
        self.messages: list[list[Any]] = []

    def copy(self) -> "Conversation":
        return Conversation()

    def append_message(self, role: str, message: str | None) -> None:
        self.messages.append([role, message])

    def get_prompt(self) -> str:
        turns = [
            f"{role}\n{said}{self.sep}\n" if said else f"{role}\n" for role, said in self.messages
        ]
        return "".join([self.system, self.sep, "\n", *turns])


@dataclass
class Seen:
    """prompts : in the order in which they were tokenized.
    aspect : of pictures, "pad" or the checkpoint's own; None where there were none.
    pictures : that were given to the network. settings : of its generation.
    """

    prompts: list[str] = field(default_factory=list)
    aspect: str | None = None
    pictures: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class _Network:
    """Answers the same to everything, and keeps what it was asked."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def generate(self, *_: Any, **settings: Any) -> torch.Tensor:
        self._seen.settings = settings
        return torch.zeros(1, 1, dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"loss": torch.tensor(0.0), "logits": torch.zeros(*input_ids.shape, 2)}


class _Tokenizer:
    pad_token_id, eos_token_id, padding_side = 0, 1, "right"

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def batch_decode(self, *_: Any, **__: Any) -> list[str]:
        return [" an answer "]


def _module() -> Any:
    """The file of the adapter. It imports decord, for which transformers looks, too."""
    decord = ModuleType("decord")
    vars(decord).update(VideoReader=None, cpu=None)
    sys.modules["decord"] = decord
    try:
        from lmms_eval.models.simple import llava_onevision
    finally:
        del sys.modules["decord"]
    return llava_onevision


@contextmanager
def reference(documents: Sequence[Any]) -> Iterator[tuple[Any, Seen]]:
    """The adapter, with ``documents`` as the split "test" of the task "task"."""
    module, seen = _module(), Seen()

    def tokenizer_image_token(prompt: str, *_: Any, **__: Any) -> torch.Tensor:
        seen.prompts.append(prompt)
        return torch.arange(1, len(prompt) + 1)

    def process_images(pictures: list[Any], _: Any, config: Any) -> list[torch.Tensor]:
        seen.aspect, seen.pictures = config.image_aspect_ratio, pictures
        return [torch.zeros(1) for _ in pictures]

    names = {
        "DEFAULT_IMAGE_TOKEN": "<image>",
        "IMAGE_TOKEN_INDEX": -200,
        "conv_templates": {"qwen_1_5": Conversation()},
        "tokenizer_image_token": tokenizer_image_token,
        "process_images": process_images,
        "SeparatorStyle": SimpleNamespace(TWO="TWO"),
        "KeywordsStoppingCriteria": lambda *_: None,
    }
    before = {name: getattr(module, name, None) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    adapter: Any = object.__new__(module.Llava_OneVision)
    frames = {"pixel_values": torch.zeros(32)}
    vars(adapter).update(
        _config=SimpleNamespace(image_aspect_ratio="anyres_max_9"),
        _device="cpu",
        _rank=0,
        _tokenizer=_Tokenizer(),
        _model=_Network(seen),
        _image_processor=SimpleNamespace(preprocess=lambda *_, **__: frames),
        load_video=lambda *_: np.zeros((32, 2, 2, 3), np.uint8),
        batch_size_per_gpu=1,
        cache_hook=CacheHook(None),
        conv_template="qwen_1_5",
        max_frames_num=32,
        mm_spatial_pool_stride=2,
        mm_spatial_pool_mode="bilinear",
        task_dict={"task": {"test": documents}},
        token_strategy="single",
        use_cache=True,
        video_decode_backend="decord",
    )
    try:
        yield adapter, seen
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def request(kind: str, *arguments: Any, **metadata: Any) -> Instance:
    """A real request of the document 0."""
    about = {"task": "task", "doc_id": 0, "repeats": 1, **metadata}
    return Instance(kind, (*arguments, 0, "task", "test"), 0, about)
