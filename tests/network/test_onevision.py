"""Packing and look-up against plain numpy; steps of any size give the same logits."""

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.networks import TextConfig, VisionConfig
from mlx_onevision.errors import CancelledError
from mlx_onevision.media.anyres import Packing, VideoPacking, plan_packing, thinned
from mlx_onevision.network.memory_sizes import Budget
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.packing import (
    interpolate,
    normalize,
    pack_image,
    pack_video,
    pool_frames,
)

SIZE, SIDE = 28, 2
PINPOINTS = tuple((SIZE * h, SIZE * w) for h in range(1, 5) for w in range(1, 5))


def tiny(**text: object) -> OneVision:
    mx.random.seed(0)
    config = OneVisionConfig(
        text_config=TextConfig.from_dict(
            {
                "vocab_size": 50,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                **text,
            }
        ),
        vision_config=VisionConfig(16, 24, 3, 2, 3, SIZE, 14),
        image_token_index=48,
        video_token_index=49,
        vision_aspect_ratio="anyres_max_2",
        image_grid_pinpoints=PINPOINTS,
    )
    model = OneVision(config)
    model.image_newline = mx.random.normal((16,))
    mx.eval(model.parameters())
    return model


def bilinear(grid: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """The textbook formula, one value at a time; positions in float32, as torch has them."""
    H, W, D = grid.shape
    half, y_scale, x_scale = np.float32(0.5), np.float32(H) / np.float32(rows), np.float32(W)
    x_scale = x_scale / np.float32(cols)
    out = np.zeros((rows, cols, D))
    for i in range(rows):
        for j in range(cols):
            y = max(y_scale * (np.float32(i) + half) - half, np.float32(0))
            x = max(x_scale * (np.float32(j) + half) - half, np.float32(0))
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
            top = grid[y0, x0] * (1 - (x - x0)) + grid[y0, x1] * (x - x0)
            bottom = grid[y1, x0] * (1 - (x - x0)) + grid[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize(
    ("shape", "wanted"), [((27, 27), (14, 14)), ((9, 31), (7, 20)), ((3, 2), (1, 1))]
)
def test_interpolation_is_bilinear_without_antialias(
    shape: tuple[int, int], wanted: tuple[int, int]
) -> None:
    grid = np.random.default_rng(0).normal(size=(*shape, 5)).astype(np.float32)
    result = interpolate(mx.array(grid), *wanted)
    np.testing.assert_allclose(np.array(result), bilinear(grid, *wanted), atol=2e-6)


def test_half_precision_is_interpolated_in_single() -> None:
    grid = mx.random.normal((9, 9, 3)).astype(mx.float16)
    expected = interpolate(grid.astype(mx.float32), 5, 5).astype(mx.float16)
    assert mx.array_equal(interpolate(grid, 5, 5), expected)


def test_pixels_are_looked_up_per_channel() -> None:
    table = np.arange(256 * 3, dtype=np.float32).reshape(256, 3) / np.float32(7)
    tiles = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    expected = table[tiles, np.arange(3)]
    assert np.array_equal(np.array(normalize(tiles, table)), expected)


@pytest.mark.parametrize("share", [1, 0.75, 0.5, 0.25, 0.01])
@pytest.mark.parametrize("size", [(28, 28), (28, 100), (100, 28), (77, 60), (112, 112), (1, 90)])
def test_an_image_is_packed_as_the_reference_packs_it(size: tuple[int, int], share: float) -> None:
    """With a share of its tokens: what bilinear thinning to the smaller grid makes of it, the base
    tile whole.
    """
    model = tiny()
    whole = plan_packing(size, PINPOINTS, SIZE, SIDE, 2)
    packing = thinned(whole, share)
    for n, kept in zip(whole.shape, packing.shape, strict=True):
        assert kept == n or (1 <= kept <= n and abs(kept - n * share**0.5) <= 1)
    D = 16
    features = np.random.default_rng(1).normal(size=(packing.tiles, SIDE * SIDE, D))
    features = features.astype(np.float32)
    rows = np.array(pack_image(mx.array(features), packing, model.image_newline))

    stitched = np.zeros((packing.grid[0] * SIDE, packing.grid[1] * SIDE, D))
    for number, tile in enumerate(features[1:]):
        r, c = divmod(number, packing.grid[1])
        stitched[r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE] = tile.reshape(SIDE, SIDE, D)
    top, bottom, left, right = packing.box
    kept = stitched[top:bottom, left:right]
    if packing.interpolated:
        kept = bilinear(kept, *packing.shape)
    expected = [features[0]]
    for row in kept:
        expected += [row, np.array(model.image_newline)[None]]
    np.testing.assert_allclose(rows, np.concatenate(expected), atol=2e-6)
    assert len(rows) == packing.tokens


def test_a_video_is_pooled_by_frame_with_one_newline() -> None:
    model = tiny()
    features = np.random.default_rng(2).normal(size=(5, 9, 16)).astype(np.float32)
    rows = np.array(
        pack_video(
            pool_frames(mx.array(features), VideoPacking(3)), "one_token", model.image_newline
        )
    )
    expected = [bilinear(frame.reshape(3, 3, 16), 2, 2).reshape(4, 16) for frame in features]
    expected.append(np.array(model.image_newline)[None])
    np.testing.assert_allclose(rows, np.concatenate(expected), atol=2e-6)


def test_a_video_with_a_share_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model, "vision_features", lambda _: mx.array(features))
    monkeypatch.setattr(model, "multi_modal_projector", lambda given: given)
    features = np.random.default_rng(2).normal(size=(3, 729, 16)).astype(np.float32)
    tiles = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    for share, side in ((1, 14), (0.75, 12), (0.5, 10), (0.25, 7), (0.001, 1)):
        packing = VideoPacking(27, share)
        tokens = packing.tokens(3)
        video = Medium("video", tiles, np.zeros((256, 3), np.float32), tokens, packing)
        (rows,) = model.encode_media([video])
        expected = [bilinear(x.reshape(27, 27, 16), side, side).reshape(-1, 16) for x in features]
        expected.append(np.array(model.image_newline)[None])
        np.testing.assert_allclose(np.array(rows), np.concatenate(expected), atol=2e-6)
        assert len(rows) == tokens


@dataclass
class Medium:
    kind: Literal["image", "video"]
    tiles: np.ndarray
    normalization: np.ndarray
    tokens: int
    packing: Packing | VideoPacking | None = None


def _tokens(packing: Packing | VideoPacking | None, tiles: int) -> int:
    if isinstance(packing, VideoPacking):
        return packing.tokens(tiles)
    return packing.tokens if packing else SIDE**2 + 1


def some_media() -> list[Medium]:
    """Images of one tile and of several, videos, and two ways to normalise: 16 tiles."""
    rng = np.random.default_rng(3)
    packing = plan_packing((28, 100), PINPOINTS, SIZE, SIDE, 2)
    video = VideoPacking(SIDE)
    kinds: list[tuple[Literal["image", "video"], int, Packing | VideoPacking | None]] = [
        ("image", 1, None),
        ("video", 3, video),
        ("image", packing.tiles, packing),
        ("image", 1, None),
        ("video", 5, video),
        ("image", 1, None),
    ]
    table = np.linspace(-1, 1, 256 * 3, dtype=np.float32).reshape(256, 3)
    return [
        Medium(
            kind,
            rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8),
            table * np.float32(0.5) if kind == "video" else table,
            _tokens(packing, count),
            packing,
        )
        for kind, count, packing in kinds
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 10])
def test_media_that_share_groups_are_encoded_as_alone(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, media = tiny(), some_media()
    model.budget = Budget(tile_group=10, tower_interval=0, chunk=8192, interval=0)
    alone = [np.array(rows) for medium in media for rows in model.encode_media([medium])]
    model.budget = Budget(tile_group=size, tower_interval=size, chunk=256, interval=1)
    sizes: list[int] = []
    tower = model.vision_features

    def watched(pixels: mx.array) -> mx.array:
        sizes.append(len(pixels))
        return tower(pixels)

    monkeypatch.setattr(model, "vision_features", watched)
    found = list(model.encode_media(media))
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(np.array(one), other, atol=1e-5)
    tiles = sum(len(medium.tiles) for medium in media)
    assert sizes == [size] * (tiles // size) + [tiles % size] * (tiles % size > 0)


def test_encoding_that_is_ended_keeps_what_was_complete() -> None:
    """``launched`` is called once a group; what it raises ends the encoding."""
    model, media = tiny(), some_media()
    model.budget = Budget(tile_group=5, tower_interval=1, chunk=256, interval=1)
    found, calls = [], 0

    def launched() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise CancelledError("the request was cancelled")

    with pytest.raises(CancelledError):
        for rows in model.encode_media(media, launched):
            found.append(rows)
    assert len(found) == 2  # the third has tiles in both groups


def test_embedding_mixes_words_and_rows() -> None:
    model = tiny()
    for key, length in (("a", 3), ("b", 2)):
        model.bank.reserve(key, length)
        model.bank.store(key, mx.random.normal((length, 16)))
    a, b = model.bank.reserve("a", 3), model.bank.reserve("b", 2)
    # a's rows, b's right after them, a's again from its second row, in two rows of a batch.
    ids = [[1, *a, *b, 2, a[1], a[2]], [b[1], 3, *a, 4, 5, 6, 7]]
    embedded = np.array(model.embed(mx.array(ids)))
    table = np.array(model.language_model.embed_tokens.weight)
    bank = {i: np.array(model.bank.look_up(i, i + 1))[0] for i in (*a, *b)}
    expected = [[bank[i] if i in bank else table[i] for i in row] for row in ids]
    assert np.array_equal(embedded, np.array(expected))


def test_an_unknown_id_is_an_error_not_a_wrong_answer() -> None:
    with pytest.raises(ValueError, match="61"):
        tiny().embed(mx.array([[1, 61]]))


@pytest.mark.parametrize(
    "text",
    [
        {},
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    ],
)
@pytest.mark.parametrize(("chunk", "interval"), [(1, 1), (5, 1), (300, 1), (300, 2), (300, 4)])
def test_a_prompt_read_in_chunks_gives_the_same_logits(
    text: dict[str, object], chunk: int, interval: int
) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny(**text)
    ids = mx.random.randint(0, 48, (1, 20 if chunk < 20 else 400))
    whole = np.array(model(ids))
    model.budget = Budget(tile_group=1, tower_interval=1, chunk=256, interval=interval)
    cache = make_prompt_cache(model)
    pieces = [
        np.array(model(ids[:, start : start + chunk], cache=cache))
        for start in range(0, ids.shape[1], chunk)
    ]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)


def test_a_layer_that_another_module_stands_for_is_called_in_decode_steps_too() -> None:
    """As the converter records layers: compiled steps would go past it, or fail."""
    from mlx_lm.models.cache import make_prompt_cache

    model, ids = tiny(), mx.array([[3, 1, 4, 1, 5]])
    whole, calls = np.array(model(ids)), 0

    class Tap(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self._layer = layer

        def __call__(self, *given: Any) -> mx.array:
            nonlocal calls
            calls += 1
            return self._layer(*given)

    def logits() -> np.ndarray:
        cache = make_prompt_cache(model)
        steps = [model(ids[:, n : n + 1], cache) for n in range(ids.shape[1])]
        return np.array(mx.concatenate(steps, axis=1))

    np.testing.assert_allclose(logits(), whole, atol=2e-5)
    language: Any = model.language_model
    language.layers = [Tap(layer) for layer in language.layers]
    np.testing.assert_allclose(logits(), whole, atol=2e-5)
    assert calls == 3 * ids.shape[1]


def test_a_window_hides_what_is_too_far_back() -> None:
    model = tiny(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    ids = mx.random.randint(0, 48, (1, 30))
    changed = mx.concatenate([(ids[:, :1] + 1) % 48, ids[:, 1:]], axis=1)
    # Three layers of window 4 reach back 9 positions.
    before, after = np.array(model(ids)), np.array(model(changed))
    assert not np.allclose(before[0, 9], after[0, 9], atol=1e-6)
    np.testing.assert_array_equal(before[0, 10:], after[0, 10:])
