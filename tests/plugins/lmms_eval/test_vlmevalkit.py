"""The recipe for VLMEvalKit: its Python, run as it stands against the contract of VLMEvalKit's
``BaseModel``, which is written down here.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import write

from mlx_onevision.api import Model

ROOT = Path(__file__).parents[3]
PAGE = ROOT.joinpath("docs/vlmevalkit.md").read_text(encoding="utf-8")
SHAPES, SQUARE, CIRCLE = (
    str(ROOT / "examples" / name) for name in ("shapes.png", "square.png", "circle.mp4")
)


class BaseModel:
    """What VLMEvalKit's runner calls, and what it makes of a message before that."""

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def use_custom_prompt(self, dataset: str) -> bool:
        return False

    def generate(self, message: Any, dataset: str | None = None) -> str:
        parts = [message] if isinstance(message, str | dict) else list(message)
        made = []
        for part in parts:
            if isinstance(part, str):
                suffix = Path(part).suffix
                kind = {".png": "image", ".mp4": "video"}.get(suffix, "text")
                part = {"type": kind, "value": part}
            assert part["type"] in self.allowed_types, f"Invalid input type: {part['type']}"
            made.append(part)
        return self.generate_inner(made, dataset)

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        raise NotImplementedError


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that the page has."""
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = BaseModel  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in (("vlmeval", ModuleType("vlmeval")), ("vlmeval.vlm.base", base)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vlmeval.vlm", ModuleType("vlmeval.vlm"))
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, "docs/vlmevalkit.md", "exec"), names)
    return names["MLXOneVision"]


@pytest.fixture
def model(recipe: Any, tmp_path: Path) -> Iterator[Any]:
    model = recipe(str(write(tmp_path / "model")), max_new_tokens=8)
    yield model
    model.model.close()


def test_its_prompts_and_settings(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    generate = Model.generate

    def watched(self: Model, **given: Any) -> Any:
        seen.append(given)
        return generate(self, **given)

    monkeypatch.setattr(Model, "generate", watched)
    assert isinstance(model.generate([SHAPES, SQUARE, "Which is larger?"], "BLINK"), str)
    assert model.generate([{"type": "video", "value": CIRCLE}, {"type": "text", "value": "How?"}])
    assert model.generate("Hello!")
    texts = [model.model.render(given["messages"]) for given in seen]
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [
        f"{begin}<image>\n<image>\nWhich is larger?{end}",
        f"{begin}<video>\nHow?{end}",
        f"{begin}Hello!{end}",
    ]
    pictures, clips, _ = (
        model.model.prepare(given["messages"], tiling=given["tiling"]).media for given in seen
    )
    assert [medium.packing is not None for medium in pictures] == [True, True]
    (clip,) = (medium.video for medium in clips)
    assert len(clip.indices) == 16 and (clip.indices[0], clip.indices[-1]) == (0, 47)


def test_the_largest_model_sees_more_frames(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = recipe(str(write(tmp_path / "my-72b")))
    assert (large.nframe, large.max_new_tokens) == (32, 512)
    large.model.close()
