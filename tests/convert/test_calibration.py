"""mlx-lm's calibrated methods on our language model, with prompts that show images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import write
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.convert.calibration import BITS, Method, calibrate
from mlx_onevision.convert.loss import probes
from mlx_onevision.convert.loss.metrics import diverge
from mlx_onevision.engine.runner import Counters, Runner
from mlx_onevision.errors import RequestError
from mlx_onevision.network.language import Attention, DecoderLayer
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Processor

FOUR = ModuleQuantization(64, 4)
QUESTIONS = ("What is in this image?", "Which colour is the star?", "Describe the picture.")


class Subject:
    """A tiny model, and prompts about images, for calibrating and for looking at it after."""

    def __init__(self, folder: Path, tied: bool = True, dtype: str | None = None) -> None:
        if not folder.exists():
            write(folder, tied=tied)
        self.runner = Runner(load_checkpoint(folder, dtype, fused=False))
        self.model = self.runner.model
        self.processor = Processor.from_folder(folder, self.model.config)
        self.prompts = [self.ids(probes.landscape(50, 40 + n, n), n) for n in range(6)]
        self.others = [self.ids(probes.noise(40, 50 + n, n), n + 1) for n in range(4)]

    def ids(self, picture: probes.Image, number: int) -> list[int]:
        content = [
            {"type": "image", "image": picture},
            {"type": "text", "text": QUESTIONS[number % 3]},
        ]
        inputs = self.processor.prepare([{"role": "user", "content": content}])
        ids, _ = self.runner.virtual_ids(inputs)
        self.runner.fill_bank(inputs, ids, 0, Counters(), lambda *_: None)
        assert max(ids) >= self.model.config.text_config.vocab_size
        return ids


def quantized_modules(model: OneVision) -> dict[str, ModuleQuantization]:
    return {
        path: ModuleQuantization(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }


def logits(model: OneVision, prompts: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.array(model(mx.array([ids]))[0]) for ids in prompts])


def divergence(source: np.ndarray, result: np.ndarray) -> float:
    return float(diverge(source, result, np.zeros(len(source), int)).kl.mean())


def quantize_plainly(subject: Subject) -> None:
    def spec(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path.startswith("language_model.layers") and hasattr(module, "to_quantized"):
            return {"group_size": 64, "bits": 4}
        tables = path in ("language_model.embed_tokens", "lm_head")
        return {"group_size": 64, "bits": 4} if tables else False

    nn.quantize(subject.model, class_predicate=spec)


def tower(model: OneVision) -> dict[str, np.ndarray]:
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return {
        name: np.array(value.astype(mx.float32))
        for name, value in parameters.items()
        if not name.startswith(("language_model", "lm_head"))
    }


@pytest.mark.parametrize(("method", "tied"), [("gptq", True), ("gptq", False), ("awq", False)])
def test_every_method_packs_the_language_model(
    tmp_path: Path, method: Method, tied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place, as it was asked to, and nothing else; what it prints stays off stdout."""
    subject = Subject(tmp_path / "model", tied=tied)
    model, budget, before = subject.model, subject.model.budget, tower(subject.model)
    calibrate(method, model, subject.prompts[:2], FOUR)
    quantized = quantized_modules(model)
    tables = {"language_model.embed_tokens"} | (set() if tied else {"lm_head"})
    assert set(quantized.values()) == {FOUR} and tables <= quantized.keys()
    assert len(quantized) == 2 * 7 + len(tables)
    after = tower(model)
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], before[name]) for name in before)
    assert model.budget == budget
    for layer in model.language_model.layers:
        assert (type(layer), type(layer.self_attn)) == (DecoderLayer, Attention)
    names = {name for name, _ in tree_flatten(model.parameters())}
    plain = Subject(tmp_path / "model")
    quantize_plainly(plain)
    assert names - {"lm_head.weight", "lm_head.scales", "lm_head.biases"} == {
        name for name, _ in tree_flatten(plain.model.parameters()) if not name.startswith("lm_head")
    }
    assert capsys.readouterr().out == ""
    # The loader computes the same with what a folder would hold.
    weights: Any = tree_flatten(model.parameters())
    again = Subject(tmp_path / "model")
    quantize_plainly(again)
    again.model.load_weights(weights)
    ids = [[1, 7, 200, 319, 5, 90]]
    assert np.array_equal(logits(again.model, ids), logits(model, ids))


def test_calibration_is_worth_it(tmp_path: Path) -> None:
    """GPTQ loses less than plain quantization on images that it was not shown."""
    subject, plain = Subject(tmp_path / "model"), Subject(tmp_path / "model")
    source = logits(subject.model, subject.others)
    quantize_plainly(plain)
    calibrate("gptq", subject.model, subject.prompts, FOUR)
    found = divergence(source, logits(subject.model, subject.others))
    assert found < 0.8 * divergence(source, logits(plain.model, subject.others))


def test_the_images_are_seen(tmp_path: Path) -> None:
    """Other embeddings behind the same ids, other weights. (AWQ takes longest, and is given the
    same.)
    """
    made = []
    for factor in (1.0, -3.0):
        subject = Subject(tmp_path / "model")
        for entry in subject.model.bank._entries.values():
            assert entry.embeddings is not None
            entry.embeddings = entry.embeddings * factor
        calibrate("gptq", subject.model, subject.prompts[:2], FOUR)
        quantized = subject.model.language_model.layers[0].mlp.up_proj
        made.append([np.array(quantized["weight"]), np.array(quantized["scales"])])
    assert not all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("method", list(BITS))
def test_half_precision(tmp_path: Path, method: Method) -> None:
    """Stays what it is, and the packed model computes in it."""
    subject = Subject(tmp_path / "model", dtype="bfloat16")
    source = logits(subject.model, subject.others[:1])
    calibrate(method, subject.model, subject.prompts[:2], FOUR)
    parameters: dict[str, mx.array] = dict(tree_flatten(subject.model.parameters()))
    assert {value.dtype for value in parameters.values()} == {mx.bfloat16, mx.uint32}
    assert divergence(source, logits(subject.model, subject.others[:1])) < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"method": "magic"}, "there is no method 'magic'; there are awq, gptq"),
        (lambda a: a | {"prompts": []}, "awq needs calibration prompts of two tokens and more"),
        (lambda a: a | {"prompts": [[1]]}, "awq needs calibration prompts"),
        (
            lambda a: a | {"spec": ModuleQuantization(32, 4, "mxfp4")},
            "awq quantizes in affine mode; drop the other mode, or the method",
        ),
        (
            lambda a: a | {"method": "gptq", "spec": ModuleQuantization(64, 3)},
            "gptq has no 3 bits; it has 2, 4, 8",
        ),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    model = load_checkpoint(write(tmp_path), fused=False).model
    given = {"method": "awq", "prompts": [[1, 2, 3]], "spec": FOUR}
    with pytest.raises(RequestError, match=message):
        calibrate(model=model, **change(given))
    assert quantized_modules(model) == {}
