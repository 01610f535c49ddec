"""Pixels, live against the torchvision-backed processor: equal to the bit, in any size and mode.

Needs torch, torchvision and transformers, but no checkpoint and none of mlx.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import CLIP_MEAN, CLIP_STD, DEEP, arrays, noise, objects, smooth
from parity import torchvision_ops  # noqa: F401  before transformers
from PIL import Image

from mlx_onevision.config.preprocessor import ImageConfig
from mlx_onevision.errors import MediaError
from mlx_onevision.media.image import load_image
from mlx_onevision.media.resize import resize
from mlx_onevision.media.tiles import pad_to_square_tile, pixel_values, tile_image

from transformers import LlavaOnevisionImageProcessor  # isort: skip
from transformers.image_utils import load_image as reference_load_image  # isort: skip

HALF = ImageConfig()
CLIP = ImageConfig(image_mean=CLIP_MEAN, image_std=CLIP_STD)


def sizes() -> list[tuple[int, int]]:
    """300 sizes from 1 to 3,000 pixels a side: even over lengths, and even over magnitudes."""
    chance = random.Random(0)
    made: dict[tuple[int, int], None] = {}
    while len(made) < 150:
        made[chance.randint(1, 3000), chance.randint(1, 3000)] = None
    while len(made) < 300:
        made[round(3000 ** chance.random()), round(3000 ** chance.random())] = None
    return list(made)


def processor(config: ImageConfig) -> LlavaOnevisionImageProcessor:
    made = LlavaOnevisionImageProcessor(
        image_mean=list(config.image_mean), image_std=list(config.image_std)
    )
    assert made.backend == "torchvision"
    return made


def planes(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as (3, H, W), the form in which no side is taken for the channels."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def test_there_are_three_hundred_sizes() -> None:
    assert len(set(sizes())) == 300
    assert min(map(min, sizes())) <= 2 and max(map(max, sizes())) > 2950


@pytest.mark.parametrize("part", range(30))
def test_pixels_of_random_sizes(part: int) -> None:
    """Alone (tiled) and in company (padded to a square), with both normalisations in turn."""
    for index, (high, wide) in enumerate(sizes()[part * 10 : part * 10 + 10]):
        config = (HALF, CLIP)[index % 2]
        image = noise(high, wide, 3, seed=index) if index % 3 else smooth(high, wide)
        reference = processor(config)
        alone = reference([[planes(image)]], return_tensors="np")
        assert alone["image_sizes"].tolist() == [[high, wide]]
        tiles = pixel_values(tile_image(image, config), config)
        assert np.array_equal(tiles, alone["pixel_values"][0]), (high, wide)
        pair = reference([[planes(image)] * 2], return_tensors="np")["pixel_values"]
        square = pixel_values(pad_to_square_tile(image, config), config)
        assert np.array_equal(square, pair[1]), (high, wide)


@pytest.mark.parametrize("name", sorted(objects().keys() - set(DEEP)))
def test_objects(name: str) -> None:
    picture = objects()[name]
    expected = processor(HALF)([[picture]], return_tensors="np")
    image = load_image(picture)
    assert expected["image_sizes"].tolist() == [list(image.shape[:2])]
    assert np.array_equal(pixel_values(tile_image(image, HALF), HALF), expected["pixel_values"][0])


@pytest.mark.parametrize("name", sorted(arrays()))
def test_arrays(name: str) -> None:
    array = arrays()[name]
    expected = processor(HALF)([[array]], return_tensors="np")["pixel_values"][0]
    tiles = tile_image(load_image(array), HALF)
    assert np.array_equal(pixel_values(tiles, HALF), expected)


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "L": ("PNG", {}),
    "LA": ("PNG", {}),
    "1": ("PNG", {}),
    "P": ("PNG", {}),
    "P, one clear index": ("PNG", {"transparency": 3}),
    "P, clear by degrees": ("PNG", {"transparency": bytes(range(0, 240, 6))}),
    "RGB": ("PNG", {}),
    "RGBA": ("WEBP", {"lossless": True, "exact": True}),
    "CMYK": ("JPEG", {"quality": 90}),
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_files_upright_and_turned(name: str, tmp_path: Path) -> None:
    """Every mode as a file, in every EXIF orientation that the format can carry.

    The reference's decoders for files need a CUDA build; what its Pillow route makes of a file is
    the same for these (tests/reference/pixels.npz has what the decoders themselves make of them).
    """
    kind, options = WRITTEN[name]
    for orientation in range(1, 9) if kind != "TIFF" else (1,):
        path = tmp_path / f"{orientation}.{kind.lower()}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        objects()[name].save(path, kind, exif=exif, **options)
        expected = np.asarray(reference_load_image(str(path)))
        assert np.array_equal(load_image(path), expected), orientation


def test_deep_greys_are_scaled_where_the_reference_clamps_them(tmp_path: Path) -> None:
    """A surprise that is not followed: of 16 bits, all but 256 levels are white there."""
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    path = tmp_path / "grey.png"
    Image.fromarray(values).save(path)
    theirs, ours = np.asarray(reference_load_image(str(path))), load_image(path)
    assert len(np.unique(theirs)) <= 17 and len(np.unique(ours)) == 256
    assert np.abs(ours - (values / 257)[..., None]).max() <= 1
    objects()["F"].save(tmp_path / "float.tiff")
    with pytest.raises(MediaError, match=r"scale them to 0\.\.255"):
        load_image(tmp_path / "float.tiff")


def test_resize_alone() -> None:
    """200 resizes of hard-edged noise, up and down by up to a thousandfold."""
    chance = random.Random(5)
    for case in range(200):
        high, wide, to_high, to_wide = (round(1500 ** chance.random()) for _ in range(4))
        if (to_high, to_wide) == (1, 1):  # torch refuses this one, and no tile is so small
            continue
        image = noise(high, wide, 3, seed=case)
        if case % 2:
            image = (image > 127).astype(np.uint8) * 255
        by_torch = torch.nn.functional.interpolate(
            planes(image)[None], (to_high, to_wide), mode="bicubic", antialias=True
        )
        ours = resize(image, (to_high, to_wide))
        assert np.array_equal(ours, by_torch[0].permute(1, 2, 0).numpy()), (image.shape, ours.shape)
