# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""One pass of a folder's model over the probes.

Kept of it are final hidden states, from which the head computes the logits again, the tower's
features, and a sample of every layer's output: little enough to leave the next model the memory.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_onevision.checkpoint.load import Checkpoint, load_checkpoint
from mlx_onevision.engine.runner import Counters, Runner
from mlx_onevision.errors import CheckpointError
from mlx_onevision.network.memory_sizes import Budget
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Inputs

# Longest answer that the source gives to a probe; both models are compared on every token of it.
ANSWER = 24
# Of the output of a layer, rows kept of each chunk of tokens and of each tile.
SAMPLED_TOKENS, SAMPLED_PATCHES = 16, 8

Rows = NDArray[np.float32]


@dataclass
class Prompt:
    """One probe as ids; what the source answers is put behind ``inputs`` once it has."""

    name: str
    inputs: Inputs
    is_text: bool
    answer: list[int] = field(default_factory=list[int])

    @property
    def ids(self) -> NDArray[np.int32]:
        return np.concatenate([self.inputs.input_ids, np.array(self.answer, np.int32)])


@dataclass
class Recording:
    """What one model made of the prompts.

    hidden : for each prompt the final hidden states (positions, D) of :func:`compared_positions`,
        in the type that the model computes in.
    features : the tower's features (tiles, patches, width), a group of tiles each.
    layers : sampled rows of each layer's output, by the layer's name.
    """

    head: Callable[[mx.array], mx.array]
    budget: Budget
    values: int
    hidden: list[mx.array] = field(default_factory=list[mx.array])
    features: list[mx.array] = field(default_factory=list[mx.array])
    layers: dict[str, list[Rows]] = field(default_factory=dict[str, list[Rows]])


def record(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    answering: bool,
    dtype: str | None,
    done: Callable[[], None],
    budget: Budget | None = None,
    adapter: Path | None = None,
) -> Recording:
    """Loads a folder's model and runs it on the prompts; if ``answering``, it first answers those
    that are no texts. With another model's ``budget`` both compute in the same steps.
    """
    runner = Runner(load_checkpoint(folder, dtype=dtype, adapter=adapter))
    model = runner.model
    if budget is not None:
        model.budget = budget
    # The head alone: holding it holds none of the other weights.
    tied = model.config.tie_word_embeddings
    embedding: Any = model.language_model.embed_tokens
    head = embedding.as_linear if tied else model.lm_head
    recording = Recording(head, model.budget, count_values(model))
    for prompt in prompts:
        recording.hidden.append(_read(runner, prompt, recording, answering))
        done()
    return recording


def compared_positions(ids: NDArray[np.int32], placeholders: Sequence[int]) -> NDArray[np.intp]:
    """The positions whose next-token distributions count: not the last, which nothing follows, and
    none of media, whose predictions are neither trained nor read.
    """
    return np.flatnonzero(~np.isin(ids[:-1], placeholders))


def count_values(model: OneVision) -> int:
    """How many numbers the weights stand for, quantized or not."""
    total = 0
    network: Any = model
    for _, module in network.named_modules():
        quantized = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
        for name, value in module.items():
            if not isinstance(value, mx.array) or (quantized and name in ("scales", "biases")):
                continue
            if quantized and name == "weight":  # in words of 32 bits, which hold several each
                total += value.size * 32 // int(module.bits)
            else:
                total += value.size
    return total


def _read(runner: Runner, prompt: Prompt, recording: Recording, answering: bool) -> mx.array:
    from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

    model = runner.model
    ids, keys = runner.virtual_ids(prompt.inputs)
    cache = make_prompt_cache(model)
    with model.bank.in_use(keys):
        with _tapped(model, recording):
            runner.fill_bank(prompt.inputs, ids, 0, Counters(), lambda *_: None)
            states = _forward(model, ids, cache)
        if answering and not prompt.is_text:
            prompt.answer = _answer(runner.checkpoint, ids, cache)
            trim_prompt_cache(cache, cache[0].offset - (len(ids) - 1))
        elif prompt.answer:
            trim_prompt_cache(cache, 1)
        if prompt.answer:
            # The last id of the prompt is read again with the answer, which then is one step.
            with _tapped(model, recording):
                rest = _forward(model, [ids[-1], *prompt.answer], cache)
            states = mx.concatenate([states[:-1], rest])
    config = model.config
    placeholders = (config.image_token_index, config.video_token_index)
    kept = states[mx.array(compared_positions(prompt.ids, placeholders))]
    mx.eval(kept)
    if not mx.isfinite(kept).all():
        raise CheckpointError(
            f"{runner.checkpoint.path} computes values that are no finite numbers on the probe "
            f"'{prompt.name}'; its weights are damaged or their type is too narrow"
        )
    return kept


def _forward(model: OneVision, ids: Sequence[int], cache: list[Any]) -> mx.array:
    """Final hidden states (len(ids), D), read in chunks."""
    states: list[mx.array] = []
    for start in range(0, len(ids), model.budget.chunk):
        h = model.embed(mx.array([ids[start : start + model.budget.chunk]], mx.int32))
        states.append(model.language_model(h, cache, model.budget.interval)[0])
        mx.eval(states[-1], [layer.state for layer in cache])
    return mx.concatenate(states)


def _answer(checkpoint: Checkpoint, ids: Sequence[int], cache: list[Any]) -> list[int]:
    """The greedy answer to a prompt that is in the cache, its end-of-text token included."""
    from mlx_lm.models.cache import trim_prompt_cache

    model = checkpoint.model
    trim_prompt_cache(cache, 1)
    token = ids[-1]
    answer: list[int] = []
    with model.decoding():
        while len(answer) < ANSWER:
            # The prompt's last id may stand for a medium, but a chat template never ends so.
            token = int(model(mx.array([[token]], mx.int32), cache)[0, -1].argmax())
            answer.append(token)
            if token in checkpoint.generation_defaults.eos_token_ids:
                break
    return answer


class _Tap(nn.Module):
    """A layer whose inputs and outputs (tensors of any shape) ``keep`` is given."""

    def __init__(self, layer: Any, keep: Callable[[mx.array, mx.array], None]) -> None:
        super().__init__()
        self._layer, self._keep = layer, keep

    def __call__(self, x: mx.array, *others: Any) -> mx.array:
        y = self._layer(x, *others)
        self._keep(x, y)
        return y


@contextmanager
def _tapped(model: OneVision, recording: Recording) -> Generator[None]:
    """The model keeps features, and samples of its layers' outputs, in ``recording`` meanwhile."""
    # Any: a tap stands where the network declares its layers' own classes.
    network: Any = model
    tower, language = network.vision_tower.encoder, network.language_model
    before = tower.layers, network.multi_modal_projector, language.layers

    def sampled(place: str, most: int) -> Callable[[mx.array, mx.array], None]:
        rows = recording.layers.setdefault(place, [])

        def keep(_: mx.array, given: mx.array) -> None:
            step = max(1, given.shape[1] // most)
            chosen = given[:, step // 2 :: step][:, :most]
            values = np.array(chosen.astype(mx.float32), np.float32)
            rows.append(values.reshape(-1, given.shape[-1]))

        return keep

    projected = sampled("projector", SAMPLED_PATCHES)

    def keep_features(features: mx.array, given: mx.array) -> None:
        mx.eval(features)
        recording.features.append(features)
        projected(features, given)

    used = max(model.config.feature_layers)
    tower.layers = [
        _Tap(layer, sampled(f"tower.{n}", SAMPLED_PATCHES)) if n < used else layer
        for n, layer in enumerate(tower.layers)
    ]
    network.multi_modal_projector = _Tap(network.multi_modal_projector, keep_features)
    taps = (sampled(f"language.{n}", SAMPLED_TOKENS) for n in range(len(language.layers)))
    language.layers = [_Tap(*pair) for pair in zip(language.layers, taps, strict=True)]
    try:
        yield
    finally:
        tower.layers, network.multi_modal_projector, language.layers = before
