"""The best recipe that fits a machine: weights, a long prompt's KV cache and intermediate values.

Arithmetic only: nothing is loaded.
"""

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
from mlx_onevision.network.footprint import ANSWER_TOKENS, footprint, usable_bytes
from mlx_onevision.network.memory_sizes import Footprint


@dataclass(frozen=True)
class Fit:
    """The best recipe (None: no quantizing), the memory it takes, and why, in lines of text."""

    recipe: Recipe | None
    footprint: Footprint
    why: str


def candidates() -> list[Recipe | None]:
    """From the least measured loss to the most, each smaller than the one before it."""
    names = (8, 6, 5, "mixed_4_6", 4, "mixed_3_6", "mixed_3_4", 3, "mixed_2_6")
    return [None, *(mixed(name) if isinstance(name, str) else uniform(name) for name in names)]


def choose(
    folder: Path,
    memory: int,
    context: int | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
) -> Fit:
    """The best recipe with which a folder's model fits; see :func:`best`."""
    opened = open_checkpoint(folder)
    return best(opened.config, opened.tensors, opened.quantized, memory, context, dtype, dequantize)


def best(
    config: OneVisionConfig,
    tensors: Mapping[str, Tensor],
    quantized: Mapping[str, ModuleQuantization],
    memory: int,
    context: int | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
) -> Fit:
    """The best recipe with which a model fits into ``memory`` bytes of unified memory, and a prompt
    of ``context`` tokens; None: a question about one image of ten tiles. What is quantized already
    stays as it is, unless ``dequantize`` has it quantized anew.

    Raises:
        RequestError: when none fits, and for dequantizing what is not quantized.
    """
    kept = bool(quantized) and not dequantize
    usable = usable_bytes(memory)
    tokens = None if context is None else context + ANSWER_TOKENS
    tried: list[tuple[str, int]] = []  # recipes, and bytes of the weights
    recipe, found = None, None
    for recipe in candidates():
        plan = make_plan(
            config, tensors, quantized, recipe=recipe, dtype=dtype, dequantize=dequantize
        )
        itemsize = 4 if plan.dtype == "float32" else 2
        found = footprint(
            config,
            plan.nbytes,
            tokens=tokens,
            working_set=usable,
            itemsize=itemsize,
            quantized=recipe is not None or kept,
        )
        tried.append((recipe.name if recipe else plan.dtype, plan.nbytes))
        if found.total <= usable or kept:
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
