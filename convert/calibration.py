# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Calibrated quantization of the language model: mlx-lm's own AWQ and GPTQ, on prompts with images.

Their code expects a language model of mlx-lm's; here are the few differences. Each method quantizes
the language model in place; tower and projector are not touched. Unlike other conversions, a
calibrated one holds the whole model in memory.

- GPTQ takes prompts of any length, and float32 embeddings, because it multiplies activations.
- AWQ calls layers with a mask alone, where ours are also given their rotation; while it runs, their
  class knows the rotation. It stacks prompts, so they are cut to the length of the shortest.
"""

import dataclasses
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx import utils

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.convert.conversion import Conversion
from mlx_onevision.convert.loss import probes
from mlx_onevision.convert.loss.probes import Probe
from mlx_onevision.convert.writer import Part
from mlx_onevision.engine.runner import Counters, Runner
from mlx_onevision.errors import RequestError
from mlx_onevision.network.attention import RotaryEmbedding
from mlx_onevision.network.language import Attention, DecoderLayer
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Processor

Method = Literal["awq", "gptq"]
BITS = {"awq": (2, 3, 4, 5, 6, 8), "gptq": (2, 4, 8)}

LANGUAGE = ("language_model.", "lm_head.")  # the language model's parameters
TABLES = ("language_model.embed_tokens", "lm_head")

QUESTIONS = (
    "What is in this image?",
    "Describe the picture.",
    "Which colours are there?",
    "How many things can you count?",
    "Beschreibe das Bild in einem Satz.",
    "What is on the left, and what is on the right?",
)


def calibrated(
    conversion: Conversion, method: Method, given: Sequence[Probe] | None = None
) -> Conversion:
    """A planned conversion, its language model quantized by ``method`` and calibrated on ``given``.
    Raises RequestError for a plan that the method cannot follow.
    """
    plan = conversion.plan
    specs = {spec for module, spec in plan.specs.items() if f"{module}.".startswith(LANGUAGE)}
    if len(specs) != 1:
        raise RequestError(f"{method} quantizes the whole language model alike; drop the recipe")
    (spec,) = specs
    if skipped := [module for module in plan.skipped if f"{module}.".startswith(LANGUAGE)]:
        raise RequestError(
            f"{method} cannot quantize {skipped[0]}, whose width has no whole groups of "
            f"{spec.group_size}; give another --q-group-size"
        )
    if conversion.opened.quantized:
        raise RequestError(f"{method} needs an unquantized model; leave --method out")
    runner = Runner(load_checkpoint(conversion.source.folder, dtype=plan.dtype, fused=False))
    processor = Processor.from_folder(conversion.source.folder, runner.model.config)
    prompts: list[Sequence[int]] = []
    with ExitStack() as held:
        for probe in calibration_set() if given is None else given:
            inputs = processor.prepare(normalise_messages(messages=probe.messages), **probe.options)
            ids, keys = runner.virtual_ids(inputs)
            held.enter_context(runner.model.bank.in_use(keys))
            runner.fill_bank(inputs, ids, 0, Counters(), lambda *_: None)
            prompts.append(ids)
        calibrate(method, runner.model, prompts, spec)
    made: dict[str, mx.array] = dict(utils.tree_flatten(runner.model.parameters()))
    shards = [
        dataclasses.replace(shard, parts=tuple(_replaced(part, made) for part in shard.parts))
        for shard in conversion.shards
    ]
    return dataclasses.replace(conversion, shards=shards)


def calibration_set() -> list[Probe]:
    """Conversations about drawn images, none of which a loss is measured on: it would flatter."""
    images = [
        probes.shapes(300, 420),
        probes.landscape(420, 380, seed=21),
        probes.gradient(330, 500),
        probes.strokes(700, 500, seed=22),
        probes.landscape(360, 900, seed=23),
        probes.noise(260, 300, seed=24),
        probes.shapes(640, 480),
        probes.landscape(500, 500, seed=25),
    ]
    return [
        probes.about(f"calibration {n}", QUESTIONS[n % len(QUESTIONS)], image)
        for n, image in enumerate(images)
    ]


def calibrate(
    method: Method, model: OneVision, prompts: Sequence[Sequence[int]], spec: ModuleQuantization
) -> None:
    """Quantizes the language model in place; the embedding and the head are not calibrated.

    prompts : ids, virtual ones included, whose media have their embeddings in the feature bank.

    Raises:
        RequestError: for an unknown method, no prompts, and bits or modes that the method has not.
    """
    if method not in BITS:
        raise RequestError(f"there is no method '{method}'; there are {', '.join(BITS)}")
    if not prompts or min(map(len, prompts)) < 2:
        raise RequestError(f"{method} needs calibration prompts of two tokens and more")
    require_spec(method, spec)
    with redirect_stdout(sys.stderr):
        (_gptq if method == "gptq" else _awq)(model, prompts, spec)
    model.eval()
    mx.eval(model.parameters())


def require_spec(method: str, spec: ModuleQuantization) -> None:
    """Raises RequestError for a quantization that a method does not have, saying what it has."""
    if spec.mode != "affine":
        raise RequestError(f"{method} quantizes in affine mode; drop the other mode, or the method")
    if spec.bits not in BITS[method]:
        raise RequestError(
            f"{method} has no {spec.bits} bits; it has {', '.join(map(str, BITS[method]))}"
        )


def _replaced(part: Part, made: dict[str, mx.array]) -> Part:
    """A part of the language model with the tensors that the method made; any other as it is."""
    if not part.pieces[0].name.startswith(LANGUAGE):
        return part
    # Looked up now: a tensor that the method made otherwise than planned is seen before a file is.
    arrays = [made[piece.name] for piece in part.pieces]
    return Part(part.pieces, lambda: arrays)


def _embeddings(model: OneVision, ids: Sequence[int]) -> mx.array:
    """float32 (1, tokens, width)."""
    return model.embed(mx.array([list(ids)], mx.int32)).astype(mx.float32)


def _quantize_tables(model: OneVision, spec: ModuleQuantization) -> None:
    nn.quantize(model, spec.group_size, spec.bits, class_predicate=lambda path, _: path in TABLES)


class _Layers(nn.Module):
    """The decoder's layers alone, as GPTQ calls a model: with a batch of calibration data."""

    def __init__(self, model: OneVision) -> None:
        super().__init__()
        self.layers = model.language_model.layers
        # A bound method, because a module would be a child of this one, a second time.
        self._forward = model.language_model.__call__

    def __call__(self, batch: Sequence[mx.array]) -> None:
        for embeddings in batch:
            mx.eval(self._forward(embeddings))


def _gptq(model: OneVision, prompts: Sequence[Sequence[int]], spec: ModuleQuantization) -> None:
    from mlx_lm.quant import gptq

    data = [_embeddings(model, ids) for ids in prompts]
    sizes = (spec.bits, spec.group_size)
    gptq.gptq_quantize(
        _Layers(model), data, *sizes, *sizes, batch_size=1
    )  # the second: of the tables
    _quantize_tables(model, spec)


class _Table(nn.Module):
    """Stands where AWQ expects the embedding: quantized with its table, it hands embeddings on."""

    def __init__(self, quantize: Callable[[], None]) -> None:
        super().__init__()
        self._quantize = quantize

    def to_quantized(self, **_: Any) -> "_Table":
        self._quantize()
        return self

    def __call__(self, embeddings: mx.array) -> mx.array:
        return embeddings


class _MaskedAttention(Attention):
    """Attention that knows its rotation, as mlx-lm's do, and so takes a mask alone."""

    _rotate: RotaryEmbedding

    def __call__(self, x: mx.array, mask: Any = None) -> mx.array:
        return self.combine(self.attend(*self.project(x, self._rotate, 0), mask, None))


class _MaskedLayer(DecoderLayer):
    """A layer that takes a mask alone, likewise."""

    def __call__(self, x: mx.array, mask: Any = None) -> mx.array:  # type: ignore[override]
        layer: Any = self
        x = x + layer.self_attn(layer.input_layernorm(x), mask)
        return x + layer.mlp(layer.post_attention_layernorm(x))


@contextmanager
def _masked(model: OneVision) -> Generator[None]:
    """The layers as AWQ calls them: the real ones, because it replaces their parts."""
    language: Any = model.language_model
    for layer in language.layers:
        layer.__class__, layer.self_attn.__class__ = _MaskedLayer, _MaskedAttention
        layer.self_attn._rotate = language.rotate
    try:
        yield
    finally:
        for layer in language.layers:
            layer.__class__, layer.self_attn.__class__ = DecoderLayer, Attention
            del layer.self_attn._rotate


def _awq(model: OneVision, prompts: Sequence[Sequence[int]], spec: ModuleQuantization) -> None:
    awq: Any = import_module("mlx_lm.quant.awq")
    if "sliding_attention" in model.config.text_config.layer_types:
        raise RequestError("awq cannot calibrate layers that see a window; leave --method out")
    shortest = min(map(len, prompts))
    rows = [_embeddings(model, ids[:shortest]) for ids in prompts]
    inputs = mx.concatenate(rows).astype(model.dtype)
    decoder = nn.Module()  # with the attributes that AWQ uses
    decoder.layers, decoder.model = model.language_model.layers, nn.Module()
    decoder.model.embed_tokens = _Table(lambda: _quantize_tables(model, spec))
    sizes = {"group_size": spec.group_size, "bits": spec.bits}
    with _masked(model):
        awq.awq_quantize(decoder, inputs, awq.AWQ_MODEL_CONFIGS["qwen2"], **sizes)
