"""Records how the original repository's code places features, as packing.npz beside this file.

    python tests/reference/record_packing.py        (in the environment of ``make parity``)

Transformers implements one of the many settings that the original training scripts save. Stated
here, in torch and apart from this package, are the rules of its
``prepare_inputs_labels_for_multimodal`` and of what that calls, for one image or one video at a
time:

- A tower with n x n patches a tile; features (tiles, n * n, D) after the projector.
- ``image_grid_pinpoints`` are (width, height) pairs. An image takes the one that keeps most of its
  pixels, of equals the one that wastes least, of equals the first. ``image_aspect_ratio`` "anyres"
  and "anyres_max_N" have a base tile and then the grid's; "pad" and "square" one tile.
- ``mm_patch_merge_type``: "flat" is all tiles one after another. "spatial" is the base tile and the
  grid stitched. "spatial_unpad" cuts off of that grid what the image does not cover, shrinks it
  bilinearly by the root of h * w / (N * n * n) where that is more than 1.1 ("anyres_max_N" alone),
  and ends each row with the newline; one tile alone is ended by one newline.
- A frame of a video is pooled by 2: "average" and "max" without what is left over, "bilinear" to
  half of n rounded up. ``mm_newline_position``, unless the merge type is "flat": "grid" ends each
  row of each frame with the newline, "frame" each frame, "one_token" the video ("spatial_unpad"
  alone), "no_token" nothing.

For each case: ``NAME/settings`` (JSON, what config.json says), ``NAME/size`` (height and width, or
frames), and ``NAME/packed``, float32 (tokens, D). ``newline`` is float32 (D,). The features of a
case of so many tiles are ``numpy.random.default_rng(tiles)``'s.
"""

# pyright: reportMissingImports=false
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

N, D, TILE = 5, 8, 70
SQUARE = [[TILE * w, TILE * h] for w in range(1, 4) for h in range(1, 4)]
# As LLaVA-NeXT has it: no single tile, so that small images tie, and more upright than lying ones.
UNEVEN = [[TILE * w, TILE * h] for w, h in ((1, 2), (2, 1), (2, 2), (1, 3))]
SIZES = [(70, 70), (60, 150), (150, 60), (200, 200), (209, 131), (40, 211), (33, 30)]
DEFAULT = {
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": SQUARE,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_newline_position": "grid",
    "mm_spatial_pool_mode": "bilinear",
}


def features(tiles: int) -> torch.Tensor:
    values = np.random.default_rng(tiles).normal(size=(tiles, N * N, D))
    return torch.from_numpy(values.astype(np.float32))


def grid_of(size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """Columns and rows of tiles."""
    high, wide = size

    def rank(pair: list[int]) -> tuple[int, int]:
        scale = min(pair[0] / wide, pair[1] / high)
        kept = min(int(wide * scale) * int(high * scale), wide * high)
        return kept, kept - pair[0] * pair[1]

    best = max(pinpoints, key=rank)  # the first of equals
    return best[0] // TILE, best[1] // TILE


def end_with(rows: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Rows (..., length, D), each ended by the newline: (tokens, D)."""
    return torch.cat([rows, newline.expand(*rows.shape[:-2], 1, D)], dim=-2).reshape(-1, D)


def uncovered(size: tuple[int, int], grid: torch.Tensor) -> torch.Tensor:
    """A token grid (rows, columns, D) without what padding filled."""
    (high, wide), (rows, cols) = size, grid.shape[:2]
    if wide / high > cols / rows:
        cut = (rows - int(high * (cols / wide))) // 2
        return grid[cut : rows - cut]
    cut = (cols - int(wide * (rows / high))) // 2
    return grid[:, cut : cols - cut]


def shrunk(grid: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    channels_first = grid.movedim(-1, -3)
    lone = channels_first.dim() == 3
    made = functional.interpolate(
        channels_first[None] if lone else channels_first, size=(rows, cols), mode="bilinear"
    )
    return (made[0] if lone else made).movedim(-3, -1)


def image(size: tuple[int, int], settings: dict[str, Any], newline: torch.Tensor) -> torch.Tensor:
    aspect, merge = settings["image_aspect_ratio"], settings["mm_patch_merge_type"]
    if not aspect.startswith("anyres"):
        tile = features(1)
        return end_with(tile, newline) if merge == "spatial_unpad" else tile[0]
    cols, rows = grid_of(size, settings["image_grid_pinpoints"])
    given = features(1 + cols * rows)
    if merge == "flat":
        return given.reshape(-1, D)
    base, tiles = given[0], given[1:].reshape(rows, cols, N, N, D)
    grid = tiles.permute(0, 2, 1, 3, 4).reshape(rows * N, cols * N, D)
    if merge == "spatial_unpad":
        grid = uncovered(size, grid)
        if aspect.startswith("anyres_max_"):
            high, wide = grid.shape[:2]
            times = math.sqrt(high * wide / (int(aspect[11:]) * N * N))
            if times > 1.1:
                grid = shrunk(grid, int(high // times), int(wide // times))
        return torch.cat([base, end_with(grid, newline)])
    return torch.cat([base, grid.reshape(-1, D)])


def video(frames: int, settings: dict[str, Any], newline: torch.Tensor) -> torch.Tensor:
    given = features(frames).reshape(frames, N, N, D)
    mode = settings["mm_spatial_pool_mode"]
    if mode == "bilinear":
        pooled = shrunk(given, math.ceil(N / 2), math.ceil(N / 2))
    else:
        pool = {"average": functional.avg_pool2d, "max": functional.max_pool2d}[mode]
        pooled = pool(given.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    place, merge = settings["mm_newline_position"], settings["mm_patch_merge_type"]
    if merge != "flat" and place == "grid":
        return end_with(pooled, newline)
    if merge != "flat" and place == "frame":
        return end_with(pooled.reshape(frames, -1, D), newline)
    if merge == "spatial_unpad" and place == "one_token":
        return end_with(pooled.reshape(1, -1, D), newline)
    return pooled.reshape(-1, D)


def image_cases() -> dict[str, tuple[tuple[int, int], dict[str, Any]]]:
    cases = {}
    for merge in ("spatial_unpad", "spatial", "flat"):
        for aspect in ("anyres_max_2", "anyres", "pad", "square"):
            for number, size in enumerate(SIZES):
                uneven = number % 2 == 1 or size == (33, 30)
                settings: dict[str, Any] = {
                    "image_aspect_ratio": aspect,
                    "mm_patch_merge_type": merge,
                }
                settings["image_grid_pinpoints"] = UNEVEN if uneven else SQUARE
                if aspect.startswith("anyres") or number < 1:
                    name = f"{merge} {aspect} {size[0]}x{size[1]}"
                    cases[name] = (size, DEFAULT | settings)
    return cases


def video_cases() -> dict[str, tuple[int, dict[str, Any]]]:
    cases = {}
    for mode in ("bilinear", "average", "max"):
        for place in ("grid", "frame", "one_token", "no_token"):
            settings = {"mm_spatial_pool_mode": mode, "mm_newline_position": place}
            cases[f"{mode} {place}"] = (3, DEFAULT | settings)
    for merge, place in (("flat", "grid"), ("spatial", "one_token"), ("spatial", "no_token")):
        settings = {"mm_patch_merge_type": merge, "mm_newline_position": place}
        cases[f"{merge} {place}"] = (3, DEFAULT | settings)
    return cases


def main() -> None:
    newline = torch.from_numpy(np.random.default_rng(0).normal(size=D).astype(np.float32))
    arrays: dict[str, Any] = {"newline": newline.numpy()}
    for name, (size, settings) in image_cases().items():
        arrays[f"image {name}/size"] = np.array(size, np.int32)
        arrays[f"image {name}/settings"] = np.array(json.dumps(settings))
        arrays[f"image {name}/packed"] = image(size, settings, newline).numpy()
    for name, (frames, settings) in video_cases().items():
        arrays[f"video {name}/size"] = np.array([frames], np.int32)
        arrays[f"video {name}/settings"] = np.array(json.dumps(settings))
        arrays[f"video {name}/packed"] = video(frames, settings, newline).numpy()
    np.savez_compressed(Path(__file__).parent / "packing.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
