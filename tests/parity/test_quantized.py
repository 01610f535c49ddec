"""Quantised folders that mlx-vlm's converter wrote, against transformers with the dequantised
weights in float32.
"""

from pathlib import Path

import pytest
from parity import saved
from parity.cases import FEW, ask, picture
from parity.checkpoints import Tiny
from parity.compare import assert_same
from parity.oracle import Oracle
from parity.ours import Ours
from parity.pairs import Checkpoints


@pytest.mark.parametrize(
    ("bits", "group", "recipe", "tied"),
    [
        (4, 64, "", True),
        (4, 32, "", False),
        (8, 64, "", True),
        (4, 64, "mixed_4_8", False),
        (4, 64, "mixed_3_6", True),
    ],
    ids=["4-bit", "4-bit groups of 32, untied", "8-bit", "mixed 4 and 8, untied", "mixed 3 and 6"],
)
def test_written_by_mlx_vlm(
    checkpoints: Checkpoints, tmp_path: Path, bits: int, group: int, recipe: str, tied: bool
) -> None:
    # Every input width divides by 64, the widest group here; mixed recipes need a few layers.
    hub = checkpoints.hub(Tiny(tied=tied, layers=4, inter=192, v_inter=192))
    quantized = saved.by_mlx_vlm(hub, tmp_path / "quantized", bits, group, recipe)
    assert bool(saved.packed_modules(quantized)) == bool(recipe)  # entries for single modules
    oracle = Oracle(quantized, weights=saved.dequantized(quantized, hub, tmp_path / "whole"))
    ours = Ours(quantized)
    for size in FEW:
        assert_same(ours, oracle, ask(picture(size)), tokens=32)
    ours.close()
