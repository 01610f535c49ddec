"""The best recipe that fits a machine: weights, a long prompt's cache and working room."""

from dataclasses import dataclass
from pathlib import Path

from mlx_onevision import memory, recipes
from mlx_onevision.anyres import plan_packing
from mlx_onevision.checkpoint import open_checkpoint
from mlx_onevision.config import OneVisionConfig
from mlx_onevision.convert.facts import size
from mlx_onevision.errors import RequestError
from mlx_onevision.planning import make_plan
from mlx_onevision.recipes import Recipe

ANSWER = 256  # tokens, the length of an answer unless told
QUESTION = 64  # tokens of the template and of a question
TILES = (3, 3)  # the default prompt's image: nine tiles, and the base tile

# What macOS lets a GPU use, of all memory: two thirds, and of more than 36 GB three quarters.
SMALL = 36 * 2**30
STEPS = 256  # tokens by which mlx-lm's caches grow


@dataclass(frozen=True)
class Fit:
    """A recipe (None: nothing is packed), and a sentence a line that says why it is that one."""

    recipe: Recipe | None
    why: str


def candidates() -> list[Recipe | None]:
    """From the best to the smallest."""
    return [
        None,
        recipes.uniform(8),
        recipes.uniform(6),
        recipes.uniform(5),
        recipes.mixed("mixed_4_6"),
        recipes.uniform(4),
        recipes.mixed("mixed_3_6"),
        recipes.mixed("mixed_3_4"),
        recipes.uniform(3),
        recipes.mixed("mixed_2_6"),
    ]


def memory_size(unified: int) -> str:
    """A computer's memory, as it is sold."""
    return f"{unified / 2**30:g} GB"


def working_set(unified: int) -> int:
    """Bytes that a GPU may use, of a Mac's unified memory."""
    return unified * 2 // 3 if unified <= SMALL else unified * 3 // 4


def prompt_tokens(config: OneVisionConfig) -> int:
    """Tokens of a question about one image of ten tiles."""
    edge, patches = config.vision_config.image_size, config.vision_config.patches_per_side
    pixels = (TILES[0] * edge, TILES[1] * edge)
    packing = plan_packing(pixels, config.image_grid_pinpoints, edge, patches, config.max_tiles)
    return packing.tokens + QUESTION


def cache_bytes(config: OneVisionConfig, tokens: int) -> int:
    """Keys and values of so many positions, 2 bytes each."""
    text = config.text_config
    positions = -(-tokens // STEPS) * STEPS
    return 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * positions


def choose(folder: Path, unified: int, context: int | None = None, dtype: str | None = None) -> Fit:
    """The best recipe with which a model and a prompt fit into ``unified`` bytes of memory.

    context : tokens of the prompt; None for a question about one image of ten tiles.

    Raises:
        RequestError: when none fits.
    """
    opened = open_checkpoint(folder)
    config = opened.config
    tokens = prompt_tokens(config) if context is None else context
    cache = cache_bytes(config, tokens + ANSWER)
    rows = tokens * config.text_config.hidden_size * 2  # the image's features
    room = working_set(unified)
    scratch = 0
    tried: list[tuple[str, int]] = []
    for recipe in candidates():
        plan = make_plan(config, opened.tensors, opened.packed, recipe=recipe, dtype=dtype)
        scratch = memory.scratch_bytes(room, plan.nbytes)
        tried.append((recipe.name if recipe else plan.dtype, plan.nbytes))
        if plan.nbytes + cache + rows + scratch <= room:
            break
    else:
        name, least = tried[-1]
        raise RequestError(
            f"nothing fits: a Mac of {memory_size(unified)} has {size(room)} for the GPU, and "
            f"{name} takes {size(least)}, a prompt of {tokens} tokens {size(cache + rows)} and the "
            f"computation {size(scratch)}; take a smaller model or a shorter --context"
        )
    lines = [
        f"A Mac of {memory_size(unified)} has {size(room)} for the GPU, of which a prompt of "
        f"{tokens:,} tokens takes {size(cache + rows)} and the computation {size(scratch)}:",
        *(f"  {name:<10} {size(nbytes):>10}  too large" for name, nbytes in tried[:-1]),
        f"  {tried[-1][0]:<10} {size(tried[-1][1]):>10}  fits",
    ]
    return Fit(recipe, "\n".join(lines))
