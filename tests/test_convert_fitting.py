"""Which bits fit which Mac, for the published sizes; the arithmetic against real folders."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import Sizes, write
from packing import quantize

from mlx_onevision.checkpoint import load_checkpoint
from mlx_onevision.config import OneVisionConfig
from mlx_onevision.convert.fitting import RECIPES, fit, usable_bytes, weights_bytes
from mlx_onevision.convert.footprint import footprint, image_tokens
from mlx_onevision.errors import RequestError
from mlx_onevision.weights import read_weights

# Width, MLP, layers, heads, heads of keys, vocabulary, tied; as in the published files.
PUBLISHED = {
    "0.5b": (896, 4864, 24, 14, 2, 152000, True),
    "7b": (3584, 18944, 28, 28, 4, 152128, False),
    "72b": (8192, 29568, 80, 64, 8, 152128, False),
}


def published(size: str) -> OneVisionConfig:
    width, inner, layers, heads, kv_heads, vocab, tied = PUBLISHED[size]
    return OneVisionConfig.from_dict(
        {
            "model_type": "llava_onevision",
            "tie_word_embeddings": tied,
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "vocab_size": vocab,
                "max_position_embeddings": 32768,
            },
        }
    )


@pytest.mark.parametrize(
    ("size", "gigabytes", "bits"),
    [
        ("0.5b", 8, (16, 16)),
        ("0.5b", 128, (16, 16)),
        ("7b", 8, (4, 8)),
        ("7b", 16, (8, 8)),
        ("7b", 32, (16, 16)),
        ("7b", 128, (16, 16)),
        ("72b", 48, (3, 8)),
        ("72b", 64, (4, 8)),
        ("72b", 128, (8, 8)),
    ],
)
def test_the_best_that_fits(size: str, gigabytes: int, bits: tuple[int, int]) -> None:
    config = published(size)
    found = fit(config, gigabytes << 30)
    assert (found.language_bits, found.vision_bits) == bits
    assert found.footprint.total <= found.usable < gigabytes << 30
    better = RECIPES[: RECIPES.index(bits)]
    for recipe in better:
        room = footprint(config, weights_bytes(config, *recipe), working_set=found.usable)
        assert room.total > found.usable
    assert ("would take" in found.why) == bool(better)
    assert "tokens" in found.why and not found.why.endswith(".")


@pytest.mark.parametrize(("size", "gigabytes"), [("72b", 8), ("72b", 16), ("72b", 32), ("7b", 4)])
def test_nothing_fits(size: str, gigabytes: int) -> None:
    with pytest.raises(RequestError, match=r"nothing fits: of .* take a smaller model"):
        fit(published(size), gigabytes << 30)


def test_more_memory_and_shorter_prompts_never_cost_quality() -> None:
    config = published("7b")
    ranks = [
        RECIPES.index((found.language_bits, found.vision_bits))
        for found in (fit(config, gigabytes << 30) for gigabytes in range(8, 40))
    ]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 4
    ranks = [
        RECIPES.index((found.language_bits, found.vision_bits))
        for found in (fit(config, 12 << 30, tokens=n) for n in (32000, 16000, 8000, 1000))
    ]
    assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) > 1


def test_what_a_gpu_may_use() -> None:
    """As printed by Metal on such machines, in MiB."""
    for gigabytes, mebibytes in ((16, 10922.67), (32, 21845.34), (64, 49152), (96, 73728)):
        assert usable_bytes(gigabytes << 30) / 2**20 == pytest.approx(mebibytes, abs=0.1)


def test_the_stated_prompt() -> None:
    """One image of 3 x 3 tiles: 81 rows of 81 and a newline, and the base tile."""
    config = published("7b")
    assert image_tokens(config) == 729 + 81 * 82 == 7371
    room = footprint(config, 15 * 10**9)
    assert room.tokens == 7371 + 80 + 256
    # 28 layers, 4 heads of 128, keys and values, 2 bytes: 57,344 bytes each of 31 x 256 positions.
    assert room.cache == 57_344 * 31 * 256
    assert room.scratch == 192 << 20


def test_published_sizes() -> None:
    """The published 0.5B file holds 1.79 GB, the 7B 16 GB and the 72B 146 GB."""
    for size, gigabytes in (("0.5b", 1.79), ("7b", 16.06), ("72b", 146.3)):
        assert weights_bytes(published(size), 16, 16) / 1e9 == pytest.approx(gigabytes, rel=4e-3)
    for one, other in pairwise(sorted(RECIPES, reverse=True)):
        assert weights_bytes(published("7b"), *one) > weights_bytes(published("7b"), *other)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recipe", [(16, 16), (8, 8), (4, 8), (3, 4)])
def test_the_arithmetic_is_that_of_the_files(
    tmp_path: Path, recipe: tuple[int, int], tied: bool
) -> None:
    sizes = dataclasses.replace(Sizes(), hidden=128, intermediate=192, vision_intermediate=192)
    source = write(tmp_path / "source", "mlx-vlm", sizes=sizes, tied=tied, dtype="float16")
    config = load_checkpoint(source).config
    folder = source
    if recipe != (16, 16):
        loaded: Any = mx.load(str(source / "model.safetensors"))
        ways: dict[str, Any] = {}
        for name, value in loaded.items():
            bits = recipe[0] if name.startswith("language_model") else recipe[1]
            way = {"bits": bits, "group_size": 64, "mode": "affine"}
            positions = "position_embedding" in name
            if value.ndim == 2:
                ways[name.removesuffix(".weight")] = False if positions else way
        parts = ("language_model", "vision_tower", "multi_modal_projector")
        folder = quantize(source, tmp_path / "packed", group_size=64, parts=parts, modules=ways)
        load_checkpoint(folder)
    held = sum(tensor.stop - tensor.start for tensor in read_weights(folder).values())
    assert weights_bytes(config, *recipe) == held
