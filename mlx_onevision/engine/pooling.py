# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""Embeddings on the inference thread: mean vision-tower features and last hidden states. Sums and
means are taken in float32, whatever type the model computes in.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_onevision.distributed import all_sum
from mlx_onevision.engine.decode import import_mlx_lm
from mlx_onevision.engine.memory import wired
from mlx_onevision.engine.request import Counters, request_size
from mlx_onevision.engine.runner import Runner
from mlx_onevision.network.memory_sizes import SMALLEST, RequestSize
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.packing import normalize
from mlx_onevision.prompt.processor import Inputs


def tile_vectors(
    runner: Runner,
    tiles: NDArray[np.uint8],
    normalization: NDArray[np.float32],
    check: Callable[[], None],
) -> NDArray[np.float32]:
    """As :func:`tower_means`, of the model that ``runner`` has."""
    with wired(), runner.interruptible(check):
        return tower_means(runner.model, tiles, normalization, check)


def tower_means(
    model: OneVision,
    tiles: NDArray[np.uint8],
    normalization: NDArray[np.float32],
    check: Callable[[], None],
) -> NDArray[np.float32]:
    """The mean over its patches of each tile's selected tower features, before the projector:
    float32 (tiles, tower width * selected layers).

    tiles : uint8 (tiles, S, S, 3).
    normalization : float32 (256, 3), the pixel value of each level in each channel.
    check : called while the device works on a group of tiles; what it raises ends the work.
    """
    size, stage, vision = model.budget.tile_group, model.stage, model.config.vision_config
    groups: list[NDArray[np.float32]] = []
    for start in range(0, len(tiles), size):
        group = tiles[start : start + size]
        if stage is None or stage.begins:
            features = model.vision_features(normalize(group, normalization))
            means = features.astype(mx.float32).mean(axis=1)
        else:
            width = vision.hidden_size * len(model.config.feature_layers)
            means = mx.zeros((len(group), width))
        if stage is not None:  # one rank has the tower
            means = all_sum(means, stage.group)
        mx.async_eval(means)
        check()
        groups.append(np.array(means, np.float32))
    return np.concatenate(groups)


def last_hidden(
    runner: Runner, prompts: Sequence[Sequence[int]], check: Callable[[], None]
) -> NDArray[np.float32]:
    """The hidden state after the final norm at the last position of each prompt: float32 (prompts,
    hidden_size).

    prompts : ids, virtual ones included; the features of every medium must be in the feature bank.
    """
    model, chunk = runner.model, runner.prefill_chunk
    states: list[NDArray[np.float32]] = []
    for group in _padded_batches(prompts, chunk):
        check()
        longest = max(map(len, group))
        if longest > chunk:  # then it is alone
            state = _prefill_in_chunks(model, group[0], chunk, check)
            states.append(np.array(state, np.float32))
            continue
        # Padding comes after the last id, where a causal model cannot see it.
        padded = [[*ids, *([0] * (longest - len(ids)))] for ids in group]
        h = model.hidden_states(model.embed(mx.array(padded, mx.int32)))
        last = mx.array([len(ids) - 1 for ids in group])
        states.append(np.array(h[mx.arange(len(group)), last].astype(mx.float32), np.float32))
    return np.concatenate(states)


def _padded_batches(prompts: Sequence[Sequence[int]], most: int) -> Iterator[list[Sequence[int]]]:
    """Adjacent prompts that together, padded to the longest, have at most ``most`` ids."""
    group: list[Sequence[int]] = []
    for ids in prompts:
        if group and (len(group) + 1) * max(len(ids), *map(len, group)) > most:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def _prefill_in_chunks(
    model: OneVision, ids: Sequence[int], chunk: int, check: Callable[[], None]
) -> mx.array:
    """The last hidden state of one long prompt."""
    import_mlx_lm()
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    state = mx.zeros((1, model.config.text_config.hidden_size))
    for start in range(0, len(ids), chunk):
        h = model.embed(mx.array([ids[start : start + chunk]], mx.int32))
        h = model.hidden_states(h, cache, last=1)
        state = h[:, -1].astype(mx.float32)
        mx.eval(state, [layer.state for layer in cache])
        check()
    return state


def prompt_vectors(
    runner: Runner, prompts: Sequence[Inputs], check: Callable[..., None]
) -> NDArray[np.float32]:
    """The last hidden state of each prompt, float32 (prompts, hidden_size)."""
    vectors: list[NDArray[np.float32]] = []
    for group in _groups(runner, prompts):
        rows: list[list[int]] = []
        with wired(), runner.within_limit([_joint_size(group)]), ExitStack() as in_use:
            for inputs in group:
                ids, keys = runner.virtual_ids(inputs)
                in_use.enter_context(runner.model.bank.in_use(keys))
                rows.append(ids)
            in_use.enter_context(runner.interruptible(check))
            together = [(*pair, Counters()) for pair in zip(group, rows, strict=True)]
            for _ in runner.encode(together, check):
                pass
            vectors.append(last_hidden(runner, rows, check))
    return np.concatenate(vectors)


def _groups(runner: Runner, prompts: Sequence[Inputs]) -> Iterator[list[Inputs]]:
    """Adjacent prompts whose media can be held together."""
    group: list[Inputs] = []
    for inputs in prompts:
        together = runner.memory.request(_joint_size([*group, inputs]), SMALLEST)
        if group and together.total > runner.limit:
            yield group
            group = []
        group.append(inputs)
    yield group


def _joint_size(prompts: Sequence[Inputs]) -> RequestSize:
    """Of prompts that are computed one after another, and whose media are held together."""
    sizes = [request_size(inputs, 1) for inputs in prompts]
    media = tuple(medium for size in sizes for medium in size.media)
    return RequestSize(max(size.prompt for size in sizes), 1, media)
