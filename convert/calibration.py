"""A calibrated conversion: the language model's tensors come from a model that one of mlx-lm's
methods has packed, everything else as ever.

Unlike other conversions this one holds the whole model in memory.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.convert import probe_images as draw
from mlx_onevision.convert.calibrated import calibrate
from mlx_onevision.convert.conversion import Conversion
from mlx_onevision.convert.methods import Method
from mlx_onevision.convert.probes import Probe
from mlx_onevision.convert.writer import Part
from mlx_onevision.engine.runner import Counters, Runner
from mlx_onevision.errors import RequestError
from mlx_onevision.prompt.processor import Processor

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
    ways = {way for module, way in plan.ways.items() if f"{module}.".startswith(LANGUAGE)}
    if len(ways) != 1:
        raise RequestError(f"{method} packs the language model in one way; drop the recipe")
    (way,) = ways
    if left := [module for module in plan.left if f"{module}.".startswith(LANGUAGE)]:
        raise RequestError(
            f"{method} cannot pack {left[0]}, whose width has no whole groups of {way.group_size}; "
            "give another --q-group-size"
        )
    if conversion.opened.packed:
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
