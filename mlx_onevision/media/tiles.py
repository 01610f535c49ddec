"""Pixels to tiles, to the bit as transformers' ``LlavaOnevisionImageProcessor`` (its torchvision
backend, image_processing_llava_onevision.py); one squeezed tile, as the original code's
``process_images`` (LLaVA-NeXT, llava/mm_utils.py).

Tiles stay uint8 up to the device, where a table turns them into pixel values.
"""

from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.media.anyres import fitted_size, select_best_resolution
from mlx_onevision.media.parallel import parallel_map
from mlx_onevision.media.resize import Pixels, resize_each, resize_on_square


def tile_image(image: Pixels, config: ImageConfig) -> Pixels:
    """The tiles of an image that stands alone in its conversation (``_get_image_patches`` of the
    reference): the whole image squeezed into one tile, and those cut, row by row, from the image
    fitted into the best of the grids and centred on black.

    image : uint8 (H, W, 3).

    Returns uint8 (1 + rows * columns, S, S, 3), S = ``config.size``; the base tile first.
    """
    tile, size = config.size, (image.shape[0], image.shape[1])
    high, wide = select_best_resolution(size, config.image_grid_pinpoints)
    inner = fitted_size(size, (high, wide))
    top, left = (high - inner[0]) // 2, (wide - inner[1]) // 2
    tiles = np.zeros((1 + (high // tile) * (wide // tile), tile, tile, 3), np.uint8)
    tiles[0], fitted = resize_each(image, [(tile, tile), inner])
    corners = product(range(-top, high - top, tile), range(-left, wide - left, tile))

    def cut(number: int, y: int, x: int) -> None:
        part = fitted[max(y, 0) : max(y + tile, 0), max(x, 0) : max(x + tile, 0)]
        y, x = max(-y, 0), max(-x, 0)
        tiles[number, y : y + part.shape[0], x : x + part.shape[1]] = part

    parallel_map(lambda place: cut(place[0], *place[1]), enumerate(corners, 1))
    return tiles


def squeeze_to_tile(image: Pixels, config: ImageConfig) -> Pixels:
    """The one tile of an image (H, W, 3) as ``image_aspect_ratio`` "square" has it: uint8
    (1, S, S, 3), without regard to its aspect ratio.
    """
    return resize_each(image, [(config.size, config.size)])[0][None]


def pad_to_square_tile(image: Pixels, config: ImageConfig) -> Pixels:
    """The one tile of an image (H, W, 3) among several, padded to a square with the mean colour
    (``pad_to_square`` of the reference): uint8 (1, S, S, 3).
    """
    fill = [int(mean * 255) for mean in config.image_mean]
    return resize_on_square(image, config.size, fill)[None]


@lru_cache(maxsize=8)
def normalization_table(config: ImageConfig) -> NDArray[np.float32]:
    """The pixel value of each level 0 to 255 in each channel: float32 (256, 3), read-only. As in
    the reference (``_fuse_mean_std_and_rescale_factor``), the rescaling is folded into mean and
    standard deviation, all in float32.
    """
    unscale = np.float32(1.0 / config.rescale_factor)
    mean = np.array(config.image_mean, np.float32) * unscale
    std = np.array(config.image_std, np.float32) * unscale
    table = ((np.arange(256, dtype=np.float32)[:, None] - mean) / std).astype(np.float32)
    table.flags.writeable = False
    return table


def pixel_values(tiles: Pixels, config: ImageConfig) -> NDArray[np.float32]:
    """Tiles (n, S, S, 3) as the reference's ``pixel_values``: float32 (n, 3, S, S)."""
    table = normalization_table(config)
    values = np.empty((len(tiles), 3, *tiles.shape[1:3]), np.float32)
    for channel in range(3):
        np.take(table[:, channel], tiles[..., channel], out=values[:, channel])
    return values
