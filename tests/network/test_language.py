"""What makes the language model's steps fast changes no result: compiled decode steps, attention in
whole steps of the cache, batches without a mask, evaluations within a layer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import Sizes, write
from mlx_lm.models.cache import BatchKVCache, KVCache

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.network import attention, language
from mlx_onevision.network.language import Qwen2


@pytest.fixture
def model(tmp_path: Path) -> Qwen2:
    sizes = Sizes(hidden=256, intermediate=320)
    return load_checkpoint(write(tmp_path / "model", "mlx-vlm", sizes=sizes)).model.language_model


def embeddings(model: Qwen2, rows: int, length: int) -> mx.array:
    width = model.norm.weight.shape[0]
    return mx.random.normal((rows, length, width), key=mx.random.key(1)) * 0.1


def decoded(model: Any, prompt: mx.array, token: mx.array) -> np.ndarray:
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(prompt, cache))
    return np.array(model(token, cache))


@pytest.mark.parametrize("place", ["weight", "module", "layer", "norm"])
def test_a_decode_step_uses_weights_that_were_replaced(model: Qwen2, place: str) -> None:
    prompt, token = embeddings(model, 1, 9), embeddings(model, 1, 1)
    before = decoded(model, prompt, token)
    layer: Any = model.layers[1]
    if place == "weight":
        layer.mlp.down_proj.weight = 2 * layer.mlp.down_proj.weight
    elif place == "module":
        outputs, inputs = layer.self_attn.o_proj.weight.shape
        layer.self_attn.o_proj = nn.Linear(inputs, outputs, bias=False)
    elif place == "layer":
        model.layers[1] = model.layers[0]
    else:
        model.norm = nn.RMSNorm(model.norm.weight.shape[0])
        model.norm.weight = 3 * model.norm.weight
    after = decoded(model, prompt, token)
    whole = np.array(model(mx.concatenate([prompt, token], axis=1)))[:, -1:]
    assert np.abs(after - whole).max() < 1e-5 < np.abs(after - before).max()


@pytest.mark.parametrize(("held", "new"), [(0, 300), (300, 68), (256, 10), (768, 1000), (5, 2)])
def test_attention_in_whole_steps_is_attention(
    held: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of queries and keys whose lengths are those of a few plans."""
    lengths: list[tuple[int, int]] = []
    plain = mx.fast.scaled_dot_product_attention

    def counted(queries: mx.array, keys: mx.array, values: mx.array, **rest: Any) -> mx.array:
        lengths.append((queries.shape[2], keys.shape[2]))
        return plain(queries, keys, values, **rest)

    mx.random.seed(held + new)
    queries, keys, values = (mx.random.normal((1, heads, held + new, 64)) for heads in (4, 2, 2))
    cache = KVCache()
    if held:
        cache.update_and_fetch(keys[:, :, :held], values[:, :, :held])
    given: Any = cache.update_and_fetch(keys[:, :, held:], values[:, :, held:])
    queries = queries[:, :, held:]
    wanted = plain(queries, given[0], given[1], scale=0.125, mask="causal")
    monkeypatch.setattr(attention, "on_cuda", lambda: True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    found = attention.attention(queries, given[0], given[1], 0.125, "causal", cache)
    assert found.shape == wanted.shape
    # Both are rounded: an error is in proportion to the values that are averaged.
    largest = np.abs(np.array(given[1])).max()
    assert np.abs(np.array(found - wanted)).max() < 1e-6 * largest
    assert all(length % 256 == 0 for pair in lengths for length in pair) and lengths


@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 2, 1]])
def test_a_batch_has_a_mask_where_a_row_has_padding(
    model: Qwen2, padding: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Any] = []
    plain = language.attention

    def seen(*given: Any) -> mx.array:
        masks.append(given[4])
        return plain(*given)

    prompt, token = embeddings(model, 3, 9), embeddings(model, 3, 1)
    cache: list[Any] = [BatchKVCache(padding) for _ in model.layers]
    mx.eval(model(prompt, cache))
    monkeypatch.setattr(language, "attention", seen)
    steps = [np.array(model(token, cache)) for _ in range(2)]
    assert all((mask is None) != any(padding) for mask in masks) and masks
    for row, left in enumerate(padding):
        alone = [KVCache() for _ in model.layers]
        mx.eval(model(prompt[row : row + 1, left:], alone))
        for step in steps:
            found = np.array(model(token[row : row + 1], alone))
            assert np.abs(found - step[row]).max() < 1e-5
    assert [layer.offset.tolist() for layer in cache] == [[11 - left for left in padding]] * len(
        cache
    )


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Device:
        type = mx.gpu

    monkeypatch.setattr(mx, "default_device", Device)
    yield


@pytest.mark.usefixtures("as_on_a_gpu")
def test_layers_are_evaluated_in_halves(model: Qwen2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one layer's values may be held, so that the device computes while the host builds."""
    prompt, points = embeddings(model, 1, 40), []
    wanted = np.array(model(prompt, [KVCache() for _ in model.layers]))
    evaluate = language.Pace.evaluate
    monkeypatch.setattr(
        language.Pace, "evaluate", lambda pace, *v: (points.append(len(v)), evaluate(pace, *v))
    )
    found = np.array(model(prompt, [KVCache() for _ in model.layers], 1))
    assert len(points) == 2 * len(model.layers)
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_layer_computes_the_last_positions(
    model: Qwen2, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the keys and values of all, with which the next step goes on."""
    lengths: list[int] = []
    feed_forward = language.DecoderLayer.feed_forward
    prompt, token = embeddings(model, rows, 21), embeddings(model, rows, 1)

    def fresh() -> list[Any]:
        padding = [0, 2, 1][:rows]
        return [BatchKVCache(padding) if rows > 1 else KVCache() for _ in model.layers]

    whole, part = fresh(), fresh()
    wanted = np.array(model(prompt, whole))[:, -2:]

    def counted(layer: Any, x: mx.array) -> mx.array:
        lengths.append(x.shape[1])
        return feed_forward(layer, x)

    monkeypatch.setattr(language.DecoderLayer, "feed_forward", counted)
    found = np.array(model(prompt, part, last=2))
    monkeypatch.undo()
    assert lengths == [21] * (len(model.layers) - 1) + [2]
    assert found.shape == wanted.shape and np.abs(found - wanted).max() < 1e-5
    after = [np.array(model(token, cache)) for cache in (whole, part)]
    assert np.abs(after[0] - after[1]).max() < 1e-5
    alone = np.array(model(prompt, last=2))
    if rows == 1:
        assert np.abs(alone - wanted).max() < 1e-5
