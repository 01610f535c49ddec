"""The memory that a model needs to answer, and what a Mac has for it: arithmetic only."""

import sys

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.media.anyres import plan_packing, single_tile_tokens
from mlx_onevision.network.memory_budget import MemoryModel, scratch_bytes
from mlx_onevision.network.memory_sizes import (
    CACHE_STEP,
    DENSE_ROWS,
    NEVER,
    Footprint,
    MediumSize,
    RequestSize,
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
    """The size of a square image that fills ``tiles`` by ``tiles`` tiles; of one tile where the
    model does not tile.
    """
    tile, patches = config.vision_config.image_size, config.vision_config.patches_per_side
    square, grids = (tile * tiles, tile * tiles), config.image_grid_pinpoints
    merge = config.mm_patch_merge_type
    if not config.is_tiled:
        return MediumSize(1, single_tile_tokens(patches, merge))
    packing = plan_packing(square, grids, tile, patches, config.max_tiles, merge)
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
    """The bytes that a model needs to answer about one image of 10 tiles.

    weights : bytes of them.
    tokens : of the prompt and its answer; None: the image, ``WORDS`` and ``ANSWER_TOKENS``.
    working_set : bytes that the device should use at most; None: computing in the smallest steps.
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


def longest_context(
    config: OneVisionConfig, weights: int, usable: int, *, itemsize: int, quantized: bool
) -> int:
    """Tokens of the longest prompt with one image of 10 tiles, its answer included, for which
    ``usable`` bytes are enough: a multiple of ``CACHE_STEP``, or the model's whole context; 0 where
    not even the image fits.
    """

    def fits(tokens: int) -> bool:
        found = footprint(
            config,
            weights,
            tokens=tokens,
            working_set=usable,
            itemsize=itemsize,
            quantized=quantized,
        )
        return found.total <= usable

    least = footprint(config, weights).tokens
    most = config.text_config.max_position_embeddings
    low, high = 0, most // CACHE_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * CACHE_STEP) else (low, middle - 1)
    found = most if low == most // CACHE_STEP else low * CACHE_STEP
    return found if found >= least else 0


def usable_bytes(memory: int) -> int:
    """The bytes that a GPU should use of so many of unified memory."""
    return memory * 3 // 4 if memory >= LARGE else memory * 2 // 3
