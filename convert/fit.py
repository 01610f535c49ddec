"""The best recipe that fits a machine: weights, a long prompt's KV cache and intermediate values.

Arithmetic only: nothing is loaded.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_onevision.checkpoint.load import open_checkpoint
from mlx_onevision.checkpoint.plan import make_plan
from mlx_onevision.checkpoint.recipes import Recipe, mixed, uniform
from mlx_onevision.checkpoint.tensors import Tensor
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.convert.report import size
from mlx_onevision.errors import RequestError
from mlx_onevision.media.anyres import plan_packing
from mlx_onevision.network.memory_budget import (
    DENSE_ROWS,
    NEVER,
    Footprint,
    MediumSize,
    MemoryModel,
    RequestSize,
    scratch_bytes,
)

# Sizes are stated for a prompt of one image of 3 x 3 tiles (and the base tile) and some words.
TILES = 3
WORDS = 80
ANSWER_TOKENS = 256

# Metal's recommendedMaxWorkingSetSize, as people have printed it (MiB of GiB): 10,923 of 16 and
# 21,845 of 32 are two thirds; 49,152 of 64 and 73,728 of 96 are three quarters
# (github.com/ggml-org/llama.cpp issues 5206, 2011, 1870, 3213). Recent systems give more, 107.5 of
# 128 GiB for one (github.com/antirez/ds4 issue 890), but a model has to fit on the others, too.
LARGE = 36 << 30


def image_size(config: OneVisionConfig, tiles: int = TILES) -> MediumSize:
    """One square image that fills ``tiles`` by ``tiles`` tiles."""
    tile, patches = config.vision_config.image_size, config.vision_config.patches_per_side
    square, grids = (tile * tiles, tile * tiles), config.image_grid_pinpoints
    packing = plan_packing(square, grids, tile, patches, config.max_tiles)
    return MediumSize(packing.tiles, packing.tokens, packing)


def footprint(
    config: OneVisionConfig,
    weights: int,
    *,
    tokens: int | None = None,
    working_set: int | None = None,
    itemsize: int = 2,
    quantized: bool = False,
) -> Footprint:
    """What a model with ``weights`` bytes of weights needs to answer about one 10-tile image.

    tokens : of the prompt and its answer; None: the image, some words, and an answer.
    working_set : bytes that the device should use at most; None: the smallest memory budget.
    itemsize : bytes a value, of the type that the model computes in.
    quantized : whether the weights are.
    """
    image = image_size(config)
    if tokens is None:
        tokens = image.tokens + WORDS + ANSWER_TOKENS
    size = RequestSize(tokens - ANSWER_TOKENS, ANSWER_TOKENS, (image,))
    memory = MemoryModel(
        config,
        weights,
        itemsize,
        dense_rows=DENSE_ROWS if quantized else NEVER,
        dense_tower=quantized,
    )
    budget = memory.plan(scratch_bytes(working_set or weights, weights))
    return memory.request(size, memory.fitted([size], budget, working_set or sys.maxsize))


@dataclass(frozen=True)
class Fit:
    recipe: Recipe | None
    footprint: Footprint
    why: str


def candidates() -> list[Recipe | None]:
    """From the least measured loss to the most, each smaller than the one before it."""
    names = (8, 6, 5, "mixed_4_6", 4, "mixed_3_6", "mixed_3_4", 3, "mixed_2_6")
    return [None, *(mixed(name) if isinstance(name, str) else uniform(name) for name in names)]


def usable_bytes(memory: int) -> int:
    """What a GPU should use of so much unified memory."""
    return memory * 3 // 4 if memory >= LARGE else memory * 2 // 3


def choose(folder: Path, memory: int, context: int | None = None, dtype: str | None = None) -> Fit:
    """The best recipe with which a folder's model fits; see :func:`best`."""
    opened = open_checkpoint(folder)
    return best(opened.config, opened.tensors, opened.quantized, memory, context, dtype)


def best(
    config: OneVisionConfig,
    tensors: Mapping[str, Tensor],
    quantized: Mapping[str, ModuleQuantization],
    memory: int,
    context: int | None = None,
    dtype: str | None = None,
) -> Fit:
    """The best recipe with which a model fits into ``memory`` bytes of unified memory, and a prompt
    of ``context`` tokens; None: a question about one image of ten tiles.

    Raises:
        RequestError: when none fits.
    """
    usable = usable_bytes(memory)
    tokens = None if context is None else context + ANSWER_TOKENS
    tried: list[tuple[str, int]] = []
    recipe, found = None, None
    for recipe in candidates():
        plan = make_plan(config, tensors, quantized, recipe=recipe, dtype=dtype)
        itemsize = 4 if plan.dtype == "float32" else 2
        found = footprint(
            config,
            plan.nbytes,
            tokens=tokens,
            working_set=usable,
            itemsize=itemsize,
            quantized=bool(recipe or quantized),
        )
        tried.append((recipe.name if recipe else plan.dtype, plan.nbytes))
        if found.total <= usable or quantized:
            break
    assert found is not None
    has = f"Mac of {memory / 2**30:g} GB has {size(usable)} for the GPU"
    prompt = (
        f"{found.tokens - ANSWER_TOKENS:,} tokens and its answer take "
        f"{size(found.cache + found.features)} and the computation {size(found.scratch)}"
    )
    if found.total > usable:
        name, least = tried[-1]
        raise RequestError(
            f"nothing fits: a {has}, and {name} takes {size(least)}, a prompt of {prompt}; "
            "take a smaller model or a shorter --context"
        )
    lines = [
        f"A {has}, of which a prompt of {prompt}:",
        *(f"  {name:<10} {size(nbytes):>10}  too large" for name, nbytes in tried[:-1]),
        f"  {tried[-1][0]:<10} {size(tried[-1][1]):>10}  fits",
    ]
    return Fit(recipe, found, "\n".join(lines))
