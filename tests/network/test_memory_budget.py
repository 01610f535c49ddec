"""The memory budget, tried for machines and checkpoints that are not here."""

from itertools import pairwise

import pytest

from mlx_onevision.config.model import OneVisionConfig, TextConfig
from mlx_onevision.network.memory_budget import (
    CHUNKS,
    MAX_PREFILL_BATCH_SIZE,
    MEGABYTE,
    Budget,
    batch_positions,
    plan,
    prefill_batch,
    scratch_bytes,
)

SEVEN_B = OneVisionConfig(
    text_config=TextConfig(
        vocab_size=152128,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        layer_types=("full_attention",) * 28,
    )
)


def test_more_memory_never_means_smaller_steps() -> None:
    budgets = [plan(SEVEN_B, size * MEGABYTE, 2) for size in (1, 64, 256, 1024, 4096, 16384)]
    for smaller, larger in pairwise(budgets):
        assert smaller.chunk <= larger.chunk
        assert smaller.tile_group <= larger.tile_group
    assert budgets[0] == Budget(1, 1, CHUNKS[-1], 1)
    assert budgets[-1] == Budget(10, 4, CHUNKS[0], 4)


def test_half_precision_goes_further() -> None:
    assert plan(SEVEN_B, 512 * MEGABYTE, 2).chunk > plan(SEVEN_B, 512 * MEGABYTE, 4).chunk


@pytest.mark.parametrize("gigabytes", [8, 16, 24, 64, 512])
@pytest.mark.parametrize("weights", [1, 5, 15, 140])
def test_scratch_stays_in_bounds(gigabytes: int, weights: int) -> None:
    scratch = scratch_bytes(gigabytes << 30, weights << 30)
    assert 192 * MEGABYTE <= scratch <= 3072 * MEGABYTE


def test_a_batch_reads_no_more_at_once_than_a_lone_prompt() -> None:
    for chunk in CHUNKS:
        for rows in (1, 2, 3, 8, 100):
            together, step = prefill_batch(chunk, rows)
            assert 1 <= together <= min(rows, MAX_PREFILL_BATCH_SIZE)
            assert together * step <= chunk and step >= CHUNKS[-1]


def test_keys_and_values_of_a_batch_fit_twice() -> None:
    # 28 layers, 4 heads of 128, keys and values, 2 bytes: 57,344 bytes a position.
    assert batch_positions(SEVEN_B.text_config, 2 * 57_344 * 1000, 2) == 1000
    assert batch_positions(SEVEN_B.text_config, -5, 2) == 0
