"""Tiles exactly as the package cuts them, for training and for judging."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from examples.demo_model.drawing import draw_scene, through_file, through_jpeg
from examples.demo_model.packing import GRIDS, TILE
from examples.demo_model.samples import Medium
from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.media.resize import resize
from mlx_onevision.media.tiles import pad_to_square_tile, tile_image

CONFIG = ImageConfig(size=TILE, image_grid_pinpoints=GRIDS)


def exact_tiles(medium: Medium, rng: Random) -> NDArray[np.uint8]:
    """Draw a medium and cut it: (tiles, TILE, TILE, 3)."""
    smooth = rng.random() < 0.5
    if medium.video:
        scene = medium.scenes[0]
        frames = through_file([draw_scene(scene, rng, t, smooth) for t in medium.times], rng)
        return np.stack([resize(np.asarray(frame), (TILE, TILE)) for frame in frames])
    pictures = [draw_scene(scene, rng, smooth=smooth) for scene in medium.scenes]
    if rng.random() < 0.1:
        pictures = [through_jpeg(picture, rng.randint(60, 95)) for picture in pictures]
    if len(pictures) == 1:
        return tile_image(np.asarray(pictures[0]), CONFIG)
    tiles = [pad_to_square_tile(np.asarray(picture), CONFIG) for picture in pictures]
    return np.concatenate(tiles) if tiles else np.zeros((0, TILE, TILE, 3), np.uint8)
