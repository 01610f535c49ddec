# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""What a tower that is not trained makes of the media, encoded once and kept on the disk."""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_onevision.errors import CheckpointError
from mlx_onevision.network.onevision import OneVision
from mlx_onevision.network.packing import normalize
from mlx_onevision.prompt.processor import Medium
from mlx_onevision.train.data import Example, Rows
from mlx_onevision.train.parts import write_arrays


class FeatureStore:
    """The tower's features (tiles, patches, width) of media, by their content.

    folder : where they are kept; those of each tower in a folder of its own.
    tower : what tells this tower from others: the model's revision, its type, its quantization.
    """

    def __init__(self, folder: Path, tower: Sequence[str]) -> None:
        name = blake2b(repr(tuple(tower)).encode(), digest_size=10).hexdigest()
        self._folder = folder / name

    def fill(
        self,
        model: OneVision,
        rows: Rows,
        examples: Sequence[Example],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Encodes what is not there yet. ``progress`` : called with how many rows are done, of how
        many.
        """
        # Features tell what the media show.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lacking = [e for e in examples if any(not self._path(m.key).is_file() for m in e.media)]
        for number, example in enumerate(lacking, 1):
            for medium in rows.prepare(example).media:
                path = self._path(medium.key)
                if not path.is_file():
                    features = encode(model, medium)
                    write_arrays(path, {"features": features}, {}, private=True)
            progress(number, len(lacking))
        mx.clear_cache()

    def of(self, example: Example) -> list[mx.array]:
        """The features of a row's media, in order; read when they are used.

        Raises:
            CheckpointError: where a file is damaged or has gone.
        """
        found: list[mx.array] = []
        for medium in example.media:
            path = self._path(medium.key)
            try:
                arrays: Any = mx.load(str(path))
                found.append(arrays["features"])
            except (RuntimeError, KeyError):
                raise CheckpointError(f"{path} cannot be read; delete it and start again") from None
        return found

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"


def encode(model: OneVision, medium: Medium) -> mx.array:
    """A medium's features (tiles, patches, width), made a group of tiles at a time."""
    group = model.budget.tile_group
    parts: list[mx.array] = []
    for first in range(0, len(medium.tiles), group):
        pixels = normalize(medium.tiles[first : first + group], medium.normalization)
        parts.append(model.vision_features(pixels))
        mx.eval(parts)
    return mx.concatenate(parts)
