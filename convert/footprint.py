"""How much memory a model takes while it answers a stated prompt. Arithmetic only."""

from dataclasses import dataclass

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.media.anyres import plan_packing
from mlx_onevision.network.memory_budget import scratch_bytes

# The prompt that sizes are stated for: one image of 3 x 3 tiles (and the base tile), the words
# around it, and an answer. 1152 x 1152 pixels in tiles of 384.
TILES = 3
WORDS = 80
ANSWER_TOKENS = 256

# The cache of keys and values grows by so many positions at a time.
CACHE_STEP = 256


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of answering a prompt of ``tokens`` tokens, its answer included.

    weights : of the whole model.
    cache : keys and values of every token.
    features : the rows of the image, once as tiles and once as packed into the prompt.
    scratch : the intermediate values that the memory budget allows.
    """

    tokens: int
    weights: int
    cache: int
    features: int
    scratch: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.features + self.scratch

    def to_dict(self) -> dict[str, int]:
        return {
            "tokens": self.tokens,
            "weights_bytes": self.weights,
            "cache_bytes": self.cache,
            "features_bytes": self.features,
            "scratch_bytes": self.scratch,
            "total_bytes": self.total,
        }


def image_tokens(config: OneVisionConfig, tiles: int = TILES) -> int:
    """Rows in the prompt of one square image that fills ``tiles`` by ``tiles`` tiles."""
    side = config.vision_config.image_size * tiles
    return plan_packing(
        (side, side),
        config.image_grid_pinpoints,
        config.vision_config.image_size,
        config.vision_config.patches_per_side,
        config.max_tiles,
    ).tokens


def footprint(
    config: OneVisionConfig,
    weights: int,
    *,
    tokens: int | None = None,
    working_set: int | None = None,
    itemsize: int = 2,
) -> Footprint:
    """What a model with ``weights`` bytes of weights needs.

    tokens : of the prompt and its answer; None: one 10-tile image, some words, and an answer.
    working_set : bytes that the device should use at most, of which the memory budget takes a
        share; None: the machine is no larger than it has to be, and the budget the smallest.
    itemsize : bytes a value, of the type that the model computes in.
    """
    text = config.text_config
    rows = image_tokens(config)
    if tokens is None:
        tokens = rows + WORDS + ANSWER_TOKENS
    position = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * itemsize
    held = -(-tokens // CACHE_STEP) * CACHE_STEP
    encoded = (1 + TILES**2) * config.tokens_per_tile
    scratch = scratch_bytes(weights if working_set is None else working_set, weights)
    return Footprint(
        tokens,
        weights,
        held * position,
        (rows + encoded) * text.hidden_size * itemsize,
        scratch,
    )
