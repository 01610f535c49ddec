# pyright: reportUnknownMemberType=false
"""The measured loss: how far a converted model's answers are from those of its source.

First the source goes through the probes and answers them, then the result reads the same tokens,
those answers included. Compared are the distributions over the next token at every position of
text, in nats; the tower's features; and the hidden states after every layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.tensors import read_weights
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.convert.loss import metrics
from mlx_onevision.convert.loss.metrics import (
    PARTS,
    Divergence,
    DivergenceStats,
    LayerLoss,
    Loss,
)
from mlx_onevision.convert.loss.probes import VERSION, Probe, probes
from mlx_onevision.convert.loss.recording import Prompt, Recording, compared_positions, record
from mlx_onevision.errors import CheckpointError, RequestError
from mlx_onevision.network.footprint import footprint
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Inputs, Processor

# Logits compared at once, for each model; as float64 these are 32 MB.
LOGITS = 1 << 22

Progress = Callable[[int, int], None]


def measure(
    source: Path,
    result: Path,
    *,
    dtype: str | None = "float32",
    probe_set: Sequence[Probe] | None = None,
    visual_tokens: float = 1.0,
    progress: Progress = lambda done, total: None,
    adapter: Path | None = None,
) -> Loss:
    """Measures what ``result`` has lost against ``source``; see :class:`Reference`."""
    reference = Reference(source, dtype=dtype, probe_set=probe_set, adapter=adapter)
    return reference.measure(result, progress, visual_tokens)


class Reference:
    """A source, against which any number of results are measured.

    One model is in memory at a time; of the source, which answers once, only its head stays.

    dtype : the type that both models compute in; None is each folder's own, whose rounding then
        counts, too: in half precision more than all that 8 bits lose.
    probe_set : other probes than the fixed ones; the result then compares with nothing else.
    adapter : what the results have in them; the source is measured with it, computed beside its
        matrices.
    """

    def __init__(
        self,
        source: Path,
        *,
        dtype: str | None = "float32",
        probe_set: Sequence[Probe] | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.source = source
        self._adapter = adapter
        self._dtype = dtype
        self._probes = probes() if probe_set is None else list(probe_set)
        self._config = load_checkpoint(source).config
        self._prompts = _prompts(source, self._config, self._probes)
        self._recording: Recording | None = None

    def measure(
        self,
        result: Path,
        progress: Progress = lambda done, total: None,
        visual_tokens: float = 1.0,
    ) -> Loss:
        """What ``result`` has lost; ``progress`` gets how many steps are done, and of how many.

        visual_tokens : the share of them that the result reads, see ``load``; the source reads all.
            With fewer, the language model's layers are not compared: they see other positions.

        Raises:
            RequestError: for folders of two different networks.
            CheckpointError: for a folder that cannot be loaded, whose values are not finite, or
                which makes other prompts of the same conversations than its source.
        """
        passes = 3 if self._recording is None else 2
        total, steps = passes * len(self._probes), count(1)

        def done() -> None:
            progress(next(steps), total)

        config = load_checkpoint(result).config
        _require_same_network(self.source, self._config, result, config)
        theirs = _prompts(result, config, self._probes)
        _require_same_prompts(self.source, self._prompts, result, theirs)
        run = partial(record, dtype=self._dtype, done=done)
        if self._recording is None:
            self._recording = run(self.source, self._prompts, answering=True, adapter=self._adapter)
            mx.clear_cache()
        before, prompts = self._recording, self._prompts
        if visual_tokens != 1:
            prompts = _prompts(result, config, self._probes, visual_tokens)
            for prompt, answered in zip(prompts, self._prompts, strict=True):
                prompt.answer = answered.answer
        after = run(result, prompts, answering=False, budget=before.budget)
        if visual_tokens != 1:
            for name in [name for name in before.layers if name.startswith("language")]:
                del after.layers[name]
        mx.clear_cache()
        divergences: list[Divergence] = []
        for number, prompt in enumerate(self._prompts):
            divergences.append(_compare(prompt, config, before, after, number))
            done()
        return _loss(self.source, result, config, self._prompts, divergences, before, after)


def _require_same_network(
    source: Path, config: OneVisionConfig, result: Path, other: OneVisionConfig
) -> None:
    for name, path in (
        ("vocabularies", "text_config.vocab_size"),
        ("widths", "text_config.hidden_size"),
        ("layers", "text_config.num_hidden_layers"),
        ("tower widths", "vision_config.hidden_size"),
        ("tower layers", "feature_layers"),
        ("tiles", "vision_config.image_size"),
        ("patches", "vision_config.patch_size"),
    ):
        one, two = attrgetter(path)(config), attrgetter(path)(other)
        if one != two:
            raise RequestError(
                f"{result} is not a conversion of {source}: their {name} are {two} and {one}"
            )


def _prompts(
    folder: Path, config: OneVisionConfig, given: Sequence[Probe], visual_tokens: float = 1.0
) -> list[Prompt]:
    processor = Processor.from_folder(folder, config)
    processor.visual_tokens = visual_tokens

    def inputs(probe: Probe) -> Inputs:
        if not probe.text:
            return processor.prepare(normalise_messages(messages=probe.messages), **probe.options)
        return Inputs(np.array(processor.tokenizer.encode(probe.text), np.int32), (), probe.text)

    return [Prompt(probe.name, inputs(probe), is_text=bool(probe.text)) for probe in given]


def _require_same_prompts(
    source: Path, prompts: Sequence[Prompt], result: Path, theirs: Sequence[Prompt]
) -> None:
    for one, other in zip(prompts, theirs, strict=True):
        same = np.array_equal(one.inputs.input_ids, other.inputs.input_ids)
        if not same or [m.key for m in one.inputs.media] != [m.key for m in other.inputs.media]:
            raise CheckpointError(
                f"{result} makes another prompt than {source} of the probe '{one.name}'; "
                "its tokenizer, template or preprocessor files differ"
            )


def _compare(
    prompt: Prompt, config: OneVisionConfig, before: Recording, after: Recording, number: int
) -> Divergence:
    """Applies both heads, to so many positions at a time that the logits stay small."""
    placeholders = (config.image_token_index, config.video_token_index)
    positions = compared_positions(prompt.ids, placeholders)
    following = prompt.ids[positions + 1]
    rows = max(1, LOGITS // config.text_config.vocab_size)
    pieces: list[Divergence] = []
    for start in range(0, len(positions), rows):
        chosen = slice(start, start + rows)
        source, result = (
            np.array(model.head(model.hidden[number][chosen]).astype(mx.float32), np.float32)
            for model in (before, after)
        )
        pieces.append(metrics.diverge(source, result, following[chosen]))
    names = [field.name for field in dataclasses.fields(Divergence)]
    return Divergence(*(np.concatenate([getattr(p, name) for p in pieces]) for name in names))


def _loss(
    source: Path,
    result: Path,
    config: OneVisionConfig,
    prompts: Sequence[Prompt],
    divergences: Sequence[Divergence],
    before: Recording,
    after: Recording,
) -> Loss:
    pairs = list(zip(prompts, divergences, strict=True))
    texts = [d for prompt, d in pairs if prompt.is_text]
    conversations = [d for prompt, d in pairs if not prompt.is_text]
    cosine = _cosines(before, after)
    source_weights, weights = (
        sum(tensor.stop - tensor.start for tensor in read_weights(folder).values())
        for folder in (source, result)
    )
    itemsize = 4 if config.dtype == "float32" else 2  # as it is used, not as it was measured
    return Loss(
        source=str(source),
        result=str(result),
        dtype=str(after.hidden[0].dtype).rpartition(".")[2],
        version=VERSION,
        all=_stats("all", divergences),
        conversations=_stats("conversations", conversations) if conversations else None,
        texts=_stats("texts", texts) if texts else None,
        tower_cosine_mean=float(cosine.mean()) if len(cosine) else None,
        tower_cosine_min=float(cosine.min()) if len(cosine) else None,
        source_perplexity=_perplexity([d.source_loss for d in texts]),
        result_perplexity=_perplexity([d.result_loss for d in texts]),
        bits_per_weight=8 * weights / before.values,
        weights_bytes=weights,
        source_weights_bytes=source_weights,
        disk_bytes=sum(path.stat().st_size for path in result.iterdir() if path.is_file()),
        memory=footprint(
            config, weights, itemsize=itemsize, quantized=config.quantization is not None
        ),
        layers=_layers(before, after),
        probes=tuple(_stats(prompt.name, [d]) for prompt, d in pairs),
    )


def _stats(name: str, divergences: Sequence[Divergence]) -> DivergenceStats:
    kl = np.concatenate([d.kl for d in divergences])
    same = np.concatenate([d.same for d in divergences])
    spread = kl.mean(), np.percentile(kl, 99), kl.max(), same.mean()
    return DivergenceStats(name, len(kl), *map(float, spread))


def _perplexity(losses: Sequence[metrics.Numbers]) -> float | None:
    return float(np.exp(np.concatenate(losses).mean())) if losses else None


def _cosines(before: Recording, after: Recording) -> metrics.Numbers:
    """One for each patch of each tile; exactly 1 where the features are equal."""
    found: list[metrics.Numbers] = []
    for one, other in zip(before.features, after.features, strict=True):
        a, b = (np.array(rows.astype(mx.float32)).astype(np.float64) for rows in (one, other))
        cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        found.append(np.where((a == b).all(-1), 1.0, cosine).reshape(-1))
    return np.concatenate(found) if found else np.empty(0)


def _layers(before: Recording, after: Recording) -> tuple[LayerLoss, ...]:
    layers: list[LayerLoss] = []
    for place in after.layers:
        errors: list[metrics.Numbers] = []
        for one, other in zip(before.layers[place], after.layers[place], strict=True):
            source, result = one.astype(np.float64), other.astype(np.float64)
            size = np.linalg.norm(source, axis=-1)
            errors.append(np.linalg.norm(result - source, axis=-1) / np.maximum(size, 1e-30))
        named, _, number = place.partition(".")
        part = PARTS[PARTS.index(named)]
        error = float(np.concatenate(errors).mean()) if errors else 0.0
        layers.append(LayerLoss(part, int(number or 0), error))
    layers.sort(key=lambda layer: (PARTS.index(layer.part), layer.number))
    return tuple(layers)
