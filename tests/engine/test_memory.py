"""What the memory model predicts is what MLX counts; and what does not fit is refused.

Random models, small but with intermediate values that are not lost beside constants.
"""

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
from checkpoints import write
from mlx.utils import tree_map

from mlx_onevision.api import load
from mlx_onevision.checkpoint.load import Checkpoint, load_checkpoint
from mlx_onevision.config.generation import GenerationDefaults
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.engine.batch import serve
from mlx_onevision.engine.request import ActiveRequest, PromptRequest
from mlx_onevision.engine.runner import Runner
from mlx_onevision.errors import OutOfMemoryError
from mlx_onevision.media.anyres import plan_packing, video_tokens
from mlx_onevision.network.layers import fuse
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.prompt.processor import Inputs, Medium
from mlx_onevision.sampling.sampler import Sampling

TILE = 112  # 64 patches


class NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""


@cache
def runner(name: str) -> Runner:
    """A model of random weights: the wide one has heads of 64, the deep one a large vocabulary."""
    hidden, inner, layers, heads, kv_heads, vocab, bits = {
        "wide": (896, 2432, 4, 14, 2, 8000, None),
        "deep": (512, 1408, 16, 8, 4, 60000, None),
        "plain": (512, 1408, 8, 8, 8, 8000, None),
        "4-bit": (512, 1408, 8, 8, 2, 32000, 4),
    }[name]
    config = OneVisionConfig.from_dict(
        {
            "model_type": "llava_onevision",
            "tie_word_embeddings": name != "plain",
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
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.02, model.parameters()))
    if bits:
        nn.quantize(model.language_model, bits=bits)
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
    tokens = video_tokens(frames, config.vision_config.patches_per_side)
    return Medium("video", tiles, None, None, tokens, ImageConfig())


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
    "4-bit": ("4-bit", [(300, None, 8)]),
    "4-bit, short": ("4-bit", [(20, None, 8)]),
    "4-bit, tiled": ("4-bit", [(20, TILED, 4)]),
    "batch": ("wide", [(300, None, 8), (280, None, 8)]),
    "batch of mixed lengths": ("plain", [(n, None, 6) for n in (20, 300, 40, 200)]),
    "batch of eight": ("deep", [(30, None, 4)] * 8),
    "batch with images": ("plain", [(20, "small", 6), (20, TILED, 6), (100, None, 6)]),
}


def media_of(config: OneVisionConfig, kind: str | None) -> list[Medium]:
    side = TILE * 3
    return {
        None: lambda: [],
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
