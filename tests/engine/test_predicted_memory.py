"""What the memory model predicts is what MLX counts.

Random models, small but with intermediate values that are not lost beside constants.
"""

import gc
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_onevision.checkpoint.load import Checkpoint
from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.request import ActiveRequest, PromptRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.media.anyres import VideoPacking, plan_packing
from mlx_onevision.network.layers import fuse
from mlx_onevision.network.memory_sizes import SMALLEST
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Inputs, Medium
from mlx_onevision.sampling.sampler import Sampling

TILE = 112  # 64 patches


class NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""


@cache
def runner(name: str) -> Runner:
    """A model of random weights: the wide one has heads of 64, the deep one a large vocabulary, the
    others a layer of the 0.5B model's. "-bit" quantizes, "half" computes in bfloat16.
    """
    form, _, way = name.partition(" ")
    hidden, inner, layers, heads, kv_heads, vocab = {
        "wide": (896, 2432, 3, 14, 2, 8000),
        "deep": (512, 1408, 8, 8, 4, 40000),
        "plain": (512, 1408, 6, 8, 8, 8000),
        "small": (512, 1408, 6, 8, 2, 32000),
        "0.5b": (448, 2432, 3, 7, 1, 8000),
    }[form]
    config = OneVisionConfig.from_dict(
        {
            "model_type": "llava_onevision",
            "tie_word_embeddings": form != "plain",
            "image_token_index": vocab - 2,
            "video_token_index": vocab - 1,
            "image_grid_pinpoints": [[TILE * a, TILE * b] for a in range(1, 7) for b in (1, 2, 3)],
            "vision_aspect_ratio": "anyres_max_9",
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": hidden,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "vocab_size": vocab,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 384,
                "intermediate_size": 1024,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "image_size": TILE,
                "patch_size": 14,
            },
        }
    )
    model = OneVision(config)
    dtype = mx.bfloat16 if "half" in way else mx.float32
    # The same values over and over: to draw each of them would take longer than most of the tests.
    values = 0.02 * np.random.default_rng(0).standard_normal(4099, np.float32)
    model.update(
        tree_map(lambda a: mx.array(np.resize(values, a.shape)).astype(dtype), model.parameters())
    )
    if "bit" in way:
        vision = [model.vision_tower.encoder, model.multi_modal_projector]
        for part in [model.language_model, *(vision if "whole" in way else [])]:
            nn.quantize(part, bits=int(way[0]))
    fuse(model)
    model.eval()
    mx.eval(model.parameters())
    defaults = replace(GenerationDefaults.from_dict(None, {}), eos_token_ids=())
    return Runner(Checkpoint(model, config, defaults, Path(name)))


def image(config: OneVisionConfig, height: int, width: int, seed: int = 0) -> Medium:
    patches = config.vision_config.patches_per_side
    grids, most = config.image_grid_pinpoints, config.max_tiles
    packing = plan_packing((height, width), grids, TILE, patches, most)
    tiles = np.random.default_rng(seed).integers(0, 256, (packing.tiles, TILE, TILE, 3), np.uint8)
    return Medium("image", tiles, (height, width), packing, packing.tokens, ImageConfig())


def small(config: OneVisionConfig, seed: int = 0) -> Medium:
    tiles = np.random.default_rng(seed).integers(0, 256, (1, TILE, TILE, 3), np.uint8)
    return Medium("image", tiles, None, None, config.tokens_per_tile + 1, ImageConfig())


def video(config: OneVisionConfig, frames: int) -> Medium:
    tiles = np.random.default_rng(0).integers(0, 256, (frames, TILE, TILE, 3), np.uint8)
    packing = VideoPacking.of(config)
    return Medium("video", tiles, None, packing, packing.tokens(frames), ImageConfig())


def prompt(config: OneVisionConfig, words: int, media: Sequence[Medium] = ()) -> Inputs:
    ids: list[int] = []
    for medium in media:
        placeholder = (config.image_token_index, config.video_token_index)[medium.kind == "video"]
        ids += [placeholder] * medium.tokens
    ids += np.random.default_rng(words).integers(0, 1000, words).tolist()
    return Inputs(np.array(ids, np.int32), tuple(media), "")


# Model; for each request its words, its media, and the tokens of its answer.
TILED, THINNED, EIGHT, CLIP = "tiled", "thinned", "eight", "clip"
SCENARIOS = {
    "short": ("wide", [(200, None, 8)]),
    "several chunks": ("wide", [(700, None, 8)]),
    "many keys": ("plain", [(700, None, 8)]),
    "many layers": ("deep", [(400, None, 8)]),
    "long answer": ("deep", [(20, None, 40)]),
    "answer beyond the cache": ("plain", [(250, None, 20)]),
    "one image": ("wide", [(20, "small", 8)]),
    "tiled": ("wide", [(20, TILED, 8)]),
    "tiled, deep": ("deep", [(20, TILED, 4)]),
    "tiled, many keys": ("plain", [(20, TILED, 8)]),
    "thinned": ("plain", [(20, THINNED, 4)]),
    "eight images": ("plain", [(20, EIGHT, 8)]),
    "video": ("wide", [(20, CLIP, 8)]),
    "video, many keys": ("plain", [(200, CLIP, 8)]),
    "4-bit": ("small 4-bit", [(300, None, 8)]),
    "4-bit, short": ("small 4-bit", [(20, None, 8)]),
    "4-bit, tiled": ("small 4-bit", [(20, TILED, 4)]),
    "4-bit half": ("0.5b 4-bit half", [(100, None, 2)]),
    "4-bit half, short": ("0.5b 4-bit half", [(20, None, 2)]),
    "4-bit half, image": ("0.5b 4-bit half", [(20, "small", 2)]),
    "4-bit half, batch": ("0.5b 4-bit half", [(12, None, 2)] * 2),
    "8-bit half": ("0.5b 8-bit half", [(100, None, 2)]),
    "8-bit": ("0.5b 8-bit", [(200, None, 2)]),
    "8-bit, tower too": ("small 8-bit whole", [(20, EIGHT, 2)]),
    "half": ("0.5b half", [(100, None, 2)]),
    "batch": ("wide", [(300, None, 8), (280, None, 8)]),
    "batch of mixed lengths": ("plain", [(n, None, 6) for n in (20, 300, 40, 200)]),
    "batch of eight": ("deep", [(30, None, 4)] * 8),
    "batch with images": ("plain", [(20, "small", 6), (20, TILED, 6), (100, None, 6)]),
}


def media_of(config: OneVisionConfig, kind: str | None) -> list[Medium]:
    side = TILE * 3
    return {
        None: list,
        "small": lambda: [small(config)],
        TILED: lambda: [image(config, side, side)],
        THINNED: lambda: [image(config, 2 * side, side)],
        EIGHT: lambda: [small(config, seed) for seed in range(8)],
        CLIP: lambda: [video(config, 12)],
    }[kind]()


def active_requests(requests: Sequence[tuple[Inputs, int]]) -> list[ActiveRequest]:
    return [
        ActiveRequest(PromptRequest(inputs, Sampling(), n), NoText(), n, (), threading.Event())
        for inputs, n in requests
    ]


def peak(subject: Runner, requests: Sequence[ActiveRequest]) -> int:
    """The bytes that MLX counts while requests are answered, with nothing kept of earlier ones and
    without other models.
    """
    subject.prefix.clear()
    subject.model.bank.shrink(0)
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    others = mx.get_active_memory() - subject.memory.weights
    serve(subject, deque(requests))
    for request in requests:
        assert len(list(request)) == request.max_tokens
    return max(request.counters.peak_memory_bytes for request in requests) - others


@pytest.mark.parametrize("name", SCENARIOS)
def test_predicted_within_a_tenth(name: str) -> None:
    model, rows = SCENARIOS[name]
    subject = runner(model)
    config = subject.checkpoint.config
    requests = active_requests(
        [(prompt(config, words, media_of(config, kind)), n) for words, kind, n in rows]
    )
    measured = peak(subject, requests)
    predicted = subject.memory.batch([r.size for r in requests], subject.model.budget)
    over = measured - subject.memory.weights
    print(
        f"{name}: {predicted.total / measured - 1:+.1%} of {measured / 1e6:.1f} MB,"
        f" {predicted.beyond_weights / over - 1:+.1%} of the {over / 1e6:.1f} beyond the weights"
    )
    assert predicted.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.28125), (4, 0.15625)])
def test_a_quantized_cache_takes_what_is_predicted(bits: int, share: float) -> None:
    """Of float32: a scale and a bias to each 64 values."""
    plain = runner("plain")
    subject = Runner(plain.checkpoint, kv_bits=bits)
    requests = active_requests([(prompt(plain.checkpoint.config, 700), 20)])
    measured = peak(subject, requests)
    predicted = subject.memory.request(requests[0].size, subject.model.budget)
    assert predicted.total == pytest.approx(measured, rel=0.1)
    assert subject.prefix.nbytes == predicted.cache
    assert predicted.cache == share * plain.memory.request(requests[0].size, SMALLEST).cache
