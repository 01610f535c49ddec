"""Checkpoints in, checkpoints out: the converter, installed as ``mlx_onevision.convert``.

from mlx_onevision.checkpoint import recipes
from mlx_onevision.convert.conversion import convert

summary = convert("7b", "llava-4bit", recipe=recipes.uniform(4))
print(summary.bits_per_weight, summary.files)
"""
