"""How many layers each rank has, and whether its memory suffices."""

from dataclasses import replace

import pytest
from checkpoints import Sizes, config

from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import MemoryLimitError, OutOfMemoryError
from mlx_onevision.network.memory_budget import MemoryModel
from mlx_onevision.network.memory_sizes import SMALLEST, MediumSize, RequestSize
from mlx_onevision.network.stages import Split, counts

GB = 10**9


@pytest.mark.parametrize(
    ("split", "limits", "expected"),
    [
        ((30, 50), (1, 1), (30, 50)),
        ((1, 1), (1, 1), (40, 40)),
        ((3, 5), (9, 1), (30, 50)),
        ((0.001, 1), (1, 1), (1, 79)),  # each has one at least
        ((1, 1, 2), (1, 1, 1), (20, 20, 40)),
        ("auto", (100 * GB, 100 * GB), (41, 39)),  # 43 GB each, with head, and embedding and tower
        ("auto", (96 * GB, 21 * GB), (69, 11)),
        ("auto", (21 * GB, 96 * GB, 96 * GB), (6, 39, 35)),
    ],
)
def test_layers_of_each_rank(
    split: Split, limits: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    layers, first, last = [GB] * 80, 4 * GB, 2 * GB
    assert counts(split, layers, first, last, limits) == expected


def test_a_request_is_admitted_where_every_rank_has_room_for_its_layers() -> None:
    own = MemoryModel(OneVisionConfig.from_dict(config(Sizes(layers=4))), 10 << 20)
    text = replace(own.config.text_config, num_hidden_layers=2, layer_types=("full_attention",) * 2)
    other = replace(own, config=replace(own.config, text_config=text), has_tower=False)
    size = RequestSize(2000, 100)
    needed = other.request(size, SMALLEST).total
    for limit, short in ((needed, 0), (needed - 1, 1)):
        both = replace(own, others=((other, limit),))
        assert both.room([size], SMALLEST, 1 << 40) == -short
        if not short:
            both.admit(size, 1 << 40)
            continue
        with pytest.raises(MemoryLimitError, match=f"the limit is {limit / 1e6:.2f} MB"):
            both.admit(size, 1 << 40)
    with pytest.raises(OutOfMemoryError):
        replace(own, others=((other, 1 << 20),)).admit_model(1 << 40)


def test_a_rank_without_the_tower_keeps_no_features() -> None:
    own = MemoryModel(OneVisionConfig.from_dict(config()), 10 << 20)
    size = RequestSize(2000, 100, (MediumSize(4, 1000),))
    assert own.request(size, SMALLEST).features > 0
    assert replace(own, has_tower=False).request(size, SMALLEST).features == 0
