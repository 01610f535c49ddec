"""Checkpoints in, checkpoints out: the converter, installed as ``mlx_onevision.convert``.

from mlx_onevision.checkpoint import recipes
from mlx_onevision.convert.conversion import convert

facts = convert("7b", "llava-4bit", recipe=recipes.uniform(4))
print(facts.bits_per_weight, facts.files)
"""
