"""A calibrated conversion: the language model's tensors come from a model that one of mlx-lm's
methods has packed, everything else as ever.

Unlike other conversions this one holds the whole model in memory.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.convert import probes as draw
from mlx_onevision.convert.conversion import Conversion
from mlx_onevision.convert.probes import Probe
from mlx_onevision.convert.writer import Part
from mlx_onevision.engine.runner import Counters, Runner
from mlx_onevision.errors import RequestError
from mlx_onevision.network.language import Attention, DecoderLayer, RotaryEmbedding
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Processor

# The calibrated methods, and what each of them can pack.

Method = Literal["awq", "gptq", "dwq"]
METHODS = ("awq", "gptq", "dwq")
BITS = {"awq": (2, 3, 4, 5, 6, 8), "gptq": (2, 4, 8), "dwq": (2, 3, 4, 5, 6)}


def require_packing(method: str, way: ModuleQuantization, of_table: bool = False) -> None:
    """Refuses a packing that a method does not have.

    of_table : the embedding's, or the head's, which may have any bits.

    Raises:
        RequestError: saying what it has.
    """
    if way.mode != "affine":
        raise RequestError(f"{method} packs affinely; drop the other mode, or the method")
    if not of_table and way.bits not in BITS[method]:
        raise RequestError(
            f"{method} has no {way.bits} bits; it has {', '.join(map(str, BITS[method]))}"
        )


# Calibrated quantization of the language model: mlx-lm's own AWQ, GPTQ and DWQ, on prompts that
# show pictures.
#
# Their code is used as it stands. It expects a language model of mlx-lm's making, which this one is
# all but: here stand the few things that differ. Each method packs the language model of a
# :class:`~mlx_onevision.network.onevision.OneVision` in place; tower and projector are not touched.
#
# - GPTQ collects what goes into every matrix, and takes prompts of any length. It knows 2, 4 and 8
#   bits. It is fed float32 embeddings, because it multiplies activations with each other.
# - AWQ calls layers with a mask alone, where ours are also given their rotation; meanwhile a class
#   knows it. It stacks prompts, so they are cut to the length of the shortest.
# - DWQ trains scales and biases towards the whole model's own distributions, at every position, the
#   pictures' among them. With few prompts and mlx-lm's learning rate, half precision rounds all
#   that it does away, so the command does not offer it.

# Of a distribution that DWQ trains towards, the entries that are kept, as mlx-lm keeps them.
KEPT = 1024


def calibrate(
    method: Method,
    model: OneVision,
    prompts: Sequence[Sequence[int]],
    way: ModuleQuantization,
    table: ModuleQuantization,
    *,
    learning_rate: float = 1e-6,
    passes: int = 1,
) -> None:
    """Packs the language model in place.

    prompts : ids, virtual ones included; every medium's rows have to be in the feature bank, and
        they stay what they are, whatever is done to the tower later.
    way : how the layers' matrices are packed; affine.
    table : how the embedding, and the head where it is another, are packed; affine, uncalibrated
        but for DWQ.
    learning_rate, passes : of DWQ: Adam's, and how often every prompt is seen.

    Raises:
        RequestError: for an unknown method, no prompts, and packings that the method has not.
    """
    _require(method, prompts, way, table)
    with redirect_stdout(sys.stderr), _without_evaluations(model):
        if method == "gptq":
            _gptq(model, prompts, way, table)
        elif method == "awq":
            _awq(model, prompts, way, table)
        else:
            _dwq(model, prompts, way, table, learning_rate, passes)
    model.eval()
    mx.eval(model.parameters())


def packed_modules(model: OneVision) -> dict[str, ModuleQuantization]:
    """How every packed module of a model is packed, by its path."""
    return {
        path: ModuleQuantization(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
    }


def _require(
    method: str,
    prompts: Sequence[Sequence[int]],
    way: ModuleQuantization,
    table: ModuleQuantization,
) -> None:
    if method not in METHODS:
        raise RequestError(f"there is no method '{method}'; there are {', '.join(METHODS)}")
    if not prompts or min(map(len, prompts)) < 2:
        raise RequestError(f"{method} needs calibration prompts of two tokens and more")
    require_packing(method, way)
    require_packing(method, table, of_table=True)


@contextmanager
def _without_evaluations(model: OneVision) -> Iterator[None]:
    """The model's own evaluation points would cut DWQ's gradients short."""
    before = model.budget
    model.budget = replace(before, interval=0)
    try:
        yield
    finally:
        model.budget = before


def _embeddings(model: OneVision, ids: Sequence[int]) -> mx.array:
    """float32 (1, L, D)."""
    return model.embed(mx.array([list(ids)], mx.int32)).astype(mx.float32)


def _pack_tables(model: OneVision, table: ModuleQuantization) -> None:
    def chosen(path: str, _: nn.Module) -> bool:
        return path in ("language_model.embed_tokens", "lm_head")

    nn.quantize(model, table.group_size, table.bits, class_predicate=chosen)


class _Layers(nn.Module):
    """The decoder's layers alone, as GPTQ calls a model: with a batch of calibration data."""

    def __init__(self, model: OneVision) -> None:
        super().__init__()
        self.layers = model.language_model.layers
        # A bound method, because a module would be a child of this one, a second time.
        self._read = model.language_model.__call__

    def __call__(self, batch: Sequence[mx.array]) -> None:
        for embeddings in batch:
            mx.eval(self._read(embeddings))


def _gptq(
    model: OneVision,
    prompts: Sequence[Sequence[int]],
    way: ModuleQuantization,
    table: ModuleQuantization,
) -> None:
    from mlx_lm.quant.gptq import gptq_quantize

    data = [_embeddings(model, ids) for ids in prompts]
    gptq_quantize(
        _Layers(model),
        data,
        way.bits,
        way.group_size,
        table.bits,
        table.group_size,
        batch_size=1,
    )
    _pack_tables(model, table)


class _Table(nn.Module):
    """Stands where AWQ expects the embedding: it is packed with its table, and hands embeddings
    on.
    """

    def __init__(self, pack: Callable[[], None]) -> None:
        super().__init__()
        self._pack = pack

    def to_quantized(self, **_: Any) -> "_Table":
        self._pack()
        return self

    def __call__(self, embeddings: mx.array) -> mx.array:
        return embeddings


class _Decoder(nn.Module):
    """A language model as AWQ looks into one."""

    def __init__(self, model: OneVision, table: _Table) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = table
        self.layers = model.language_model.layers


class _MaskedAttention(Attention):
    """Attention that knows its rotation, as mlx-lm's do, and so takes a mask alone."""

    _rotate: RotaryEmbedding

    def __call__(self, x: mx.array, mask: Any = None) -> mx.array:  # type: ignore[override]
        return super().__call__(x, self._rotate, mask, None)


class _MaskedLayer(DecoderLayer):
    def __call__(self, x: mx.array, mask: Any = None) -> mx.array:  # type: ignore[override]
        x = x + self.self_attn(self.input_layernorm(x), mask)  # type: ignore[call-arg]
        return x + self.mlp(self.post_attention_layernorm(x))


@contextmanager
def _masked(model: OneVision) -> Iterator[None]:
    """The layers as AWQ calls them. Other layers under the same weights would do, too; but AWQ
    replaces the layers' parts, and has to find the real ones.
    """
    language: Any = model.language_model
    for layer in language.layers:
        layer.__class__, layer.self_attn.__class__ = _MaskedLayer, _MaskedAttention
        layer.self_attn._rotate = language._rotate
    try:
        yield
    finally:
        for layer in language.layers:
            layer.__class__, layer.self_attn.__class__ = DecoderLayer, Attention
            del layer.self_attn._rotate


def _awq(
    model: OneVision,
    prompts: Sequence[Sequence[int]],
    way: ModuleQuantization,
    table: ModuleQuantization,
) -> None:
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

    if any(window is not None for window in model.language_model._windows):
        raise RequestError("awq cannot calibrate layers that see a window; leave --method out")
    shortest = min(map(len, prompts))
    inputs = mx.concatenate([_embeddings(model, ids[:shortest]) for ids in prompts])
    decoder = _Decoder(model, _Table(lambda: _pack_tables(model, table)))
    with _masked(model):
        awq_quantize(
            decoder,
            inputs.astype(model.dtype),
            AWQ_MODEL_CONFIGS["qwen2"],
            group_size=way.group_size,
            bits=way.bits,
        )


class _Student(nn.Module):
    """The language model with its head: what DWQ may train. Ids go through the whole model."""

    def __init__(self, model: OneVision) -> None:
        super().__init__()
        self.language_model = model.language_model
        if not model.config.tie_word_embeddings:
            self.lm_head = model.lm_head
        self._whole = model.__call__  # bound, so that the tower is no child of this one

    def __call__(self, ids: mx.array) -> mx.array:
        return self._whole(ids)


def _dwq(
    model: OneVision,
    prompts: Sequence[Sequence[int]],
    way: ModuleQuantization,
    table: ModuleQuantization,
    learning_rate: float,
    passes: int,
) -> None:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    data = [(list(ids), 0) for ids in prompts]
    longest = max(map(len, prompts)) + 64  # it pads, and cuts off what is longer than this
    targets: dict[bytes, tuple[mx.array, mx.array]] = {}

    def target(batch: mx.array, *_: Any, **__: Any) -> tuple[mx.array, mx.array]:
        return targets[np.array(batch).tobytes()]

    for ids, _ in data:
        batch = mx.array([_padded(ids)])[:, :-1]
        logits = model(batch)
        kept = min(KEPT, logits.shape[-1])
        likeliest = mx.argpartition(logits, kth=-kept, axis=-1)[..., -kept:]
        best = mx.take_along_axis(logits, likeliest, axis=-1)
        mx.eval(best, likeliest)
        targets[np.array(batch).tobytes()] = best, likeliest

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path.startswith("language_model.layers.") and hasattr(module, "to_quantized"):
            return {"group_size": way.group_size, "bits": way.bits}
        return False

    nn.quantize(model, class_predicate=chosen)
    _pack_tables(model, table)
    student = _Student(model)
    student.freeze()
    dwq_quantize(
        student,
        target,
        Adam(learning_rate=learning_rate, bias_correction=True),
        data * passes,
        data,
        batch_size=1,
        max_seq_length=longest,
        seed=0,
        dtype=model.dtype,
    )
    student.freeze()


def _padded(ids: Sequence[int], multiple: int = 32) -> list[int]:
    """As mlx-lm's batches are: zeros up to one more than a multiple."""
    return [*ids, *[0] * (1 + -(-len(ids) // multiple) * multiple - len(ids))]


# The language model's, in the network's own names.
LANGUAGE = ("language_model.", "lm_head.")

QUESTIONS = (
    "What is in this image?",
    "Describe the picture.",
    "Which colours are there?",
    "How many things can you count?",
    "Beschreibe das Bild in einem Satz.",
    "What is on the left, and what is on the right?",
)


def calibration_set() -> list[Probe]:
    """Conversations about drawn pictures; none of them is among those that a loss is measured on,
    which would flatter it.
    """
    pictures = [
        draw.shapes(300, 420),
        draw.landscape(420, 380, seed=21),
        draw.gradient(330, 500),
        draw.strokes(700, 500, seed=22),
        draw.landscape(360, 900, seed=23),
        draw.noise(260, 300, seed=24),
        draw.shapes(640, 480),
        draw.landscape(500, 500, seed=25),
    ]
    return [_about(n, picture) for n, picture in enumerate(pictures)]


def _about(number: int, picture: draw.Picture) -> Probe:
    question = QUESTIONS[number % len(QUESTIONS)]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return Probe(f"calibration {number}", ({"role": "user", "content": content},))


def calibrated(
    conversion: Conversion, method: Method, given: Sequence[Probe] | None = None
) -> Conversion:
    """A planned conversion whose language model is packed by ``method``.

    given : other conversations to calibrate on.

    Raises:
        RequestError: for a plan that the method cannot follow.
    """
    plan = conversion.plan
    ways = {way for module, way in plan.specs.items() if f"{module}.".startswith(LANGUAGE)}
    if len(ways) != 1:
        raise RequestError(f"{method} packs the language model in one way; drop the recipe")
    (way,) = ways
    if left := [module for module in plan.skipped if f"{module}.".startswith(LANGUAGE)]:
        raise RequestError(
            f"{method} cannot pack {left[0]}, whose width has no whole groups of {way.group_size}; "
            "give another --q-group-size"
        )
    if conversion.opened.quantized:
        raise RequestError(f"{method} needs an unquantized model; leave --method out")
    runner = Runner(load_checkpoint(conversion.source.folder, dtype=plan.dtype))
    processor = Processor.from_folder(conversion.source.folder, runner.model.config)
    prompts = []
    with ExitStack() as held:
        for probe in calibration_set() if given is None else given:
            inputs = processor.prepare(probe.messages, **probe.options)
            ids, keys = runner.virtual_ids(inputs)
            held.enter_context(runner.model.bank.in_use(keys))
            runner.fill_bank(inputs, ids, 0, Counters(), lambda *_: None)
            prompts.append(ids)
        calibrate(method, runner.model, prompts, way, way)
    parameters: dict[str, mx.array] = dict(tree_flatten(runner.model.parameters()))
    made = {name: value for name, value in parameters.items() if name.startswith(LANGUAGE)}
    shards = [
        dataclasses.replace(shard, parts=tuple(_replaced(part, made) for part in shard.parts))
        for shard in conversion.shards
    ]
    return dataclasses.replace(conversion, shards=shards)


def _replaced(part: Part, made: dict[str, mx.array]) -> Part:
    """A part whose tensors were made already; any other as it is."""
    names = [piece.name for piece in part.pieces]
    if not names[0].startswith(LANGUAGE):
        return part
    # Looked up now: a tensor that the method made otherwise than planned is seen before a file is.
    arrays = [made[name] for name in names]
    return Part(part.pieces, lambda: arrays)
