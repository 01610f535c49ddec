"""Pixel values and tiles are the reference's to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from images import (
    CLIP_MEAN,
    CLIP_STD,
    TILED_SIZES,
    digest,
    noise,
    recorded,
    smooth,
)

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.media.tiles import (
    normalization_table,
    pad_to_square_tile,
    pixel_values,
    tile_image,
)

HALF = ImageConfig()
CLIP = ImageConfig(image_mean=CLIP_MEAN, image_std=CLIP_STD)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("halves", HALF),
        ("clip", CLIP),
        ("rescaled by 1/127.5", ImageConfig(rescale_factor=1 / 127.5)),
        ("clip, rescaled by 0.004", ImageConfig(384, CLIP_MEAN, CLIP_STD, 0.004)),
    ],
)
def test_normalization_is_the_references_to_the_bit(name: str, config: ImageConfig) -> None:
    table = normalization_table(config)
    assert table.dtype == np.float32
    assert np.array_equal(table, recorded()[f"table/{name}"])
    assert table.tobytes() == np.ascontiguousarray(recorded()[f"table/{name}"]).tobytes()


def test_the_table_cannot_be_changed_by_who_gets_it() -> None:
    with pytest.raises(ValueError, match="read-only"):
        normalization_table(HALF)[0] = 0


@pytest.mark.parametrize(
    "index", range(len(TILED_SIZES)), ids=lambda i: "{}x{}".format(*TILED_SIZES[i])
)
def test_tiles_are_the_references_to_the_bit(index: int) -> None:
    high, wide = TILED_SIZES[index]
    image = noise(high, wide, 3, seed=high + wide)
    tiles, square = tile_image(image, HALF), pad_to_square_tile(image, CLIP)
    assert tiles.dtype == square.dtype == np.uint8
    assert np.array_equal(digest(pixel_values(tiles, HALF)), recorded()["tiles"][index])
    assert np.array_equal(digest(pixel_values(square, CLIP)), recorded()["squares"][index])


def test_pixel_values_gathers_from_the_table() -> None:
    tiles = noise(2, 5, 5, 3)
    values = pixel_values(tiles, CLIP)
    assert values.shape == (2, 3, 5, 5)
    assert np.array_equal(values[1, 2, 3, 4], normalization_table(CLIP)[tiles[1, 3, 4, 2], 2])


def test_tiles_of_another_size() -> None:
    """The grid, centred on black with the odd row below, cut row by row."""
    config = ImageConfig(size=8, image_grid_pinpoints=((8, 8), (16, 16), (8, 24)))
    image = np.full((5, 20, 3), 200, np.uint8)
    tiles = tile_image(image, config)
    assert tiles.shape == (4, 8, 8, 3)
    assert (tiles[0] == 200).all()
    rows = tiles[1:].swapaxes(0, 1).reshape(8, 24, 3)
    assert [int(row[0, 0]) for row in rows] == [0] + [200] * 6 + [0]
    assert pad_to_square_tile(image, config).shape == (1, 8, 8, 3)


def test_a_smooth_picture_survives_tiling() -> None:
    """An image of a grid's own size is cut, not resampled."""
    image = smooth(768, 384)
    tiles = tile_image(image, HALF)
    assert tiles.shape == (3, 384, 384, 3)
    assert np.array_equal(np.concatenate(tiles[1:]), image)
