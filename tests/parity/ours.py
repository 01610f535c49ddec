"""This package's side of a comparison, stage by stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_onevision import load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.network.packing import normalize
from mlx_onevision.prompt.processor import Inputs, Medium

Messages = Sequence[dict[str, Any]]


@dataclass
class Vision:
    """The stages from tiles to rows, all images of a prompt together; see ``oracle.Stages``."""

    tower: np.ndarray
    projected: np.ndarray
    packed: list[np.ndarray]


class Ours:
    """A folder as a user loads it (``model``), and its bare network for what goes on inside."""

    def __init__(self, folder: Path, dtype: str | None = None, adapter: Path | None = None) -> None:
        self.model = load(folder, dtype=dtype, adapter=adapter)
        self.network = load_checkpoint(folder, dtype=dtype, adapter=adapter).model

    def vision(self, inputs: Inputs) -> Vision:
        """What the network makes of a prepared prompt's images."""
        network = self.network
        towers, projections, packed = [], [], []
        for medium in inputs.media:
            tower = network.vision_features(normalize(medium.tiles, medium.normalization))
            towers.append(np.array(tower))
            projections.append(np.array(network.multi_modal_projector(tower)))
            packed.append(self.rows(medium))
        return Vision(np.concatenate(towers), np.concatenate(projections), packed)

    def rows(self, medium: Medium) -> np.ndarray:
        """What the network makes of one image or video."""
        (rows,) = self.network.encode_media([medium])
        return np.array(rows)

    def tokens(self, messages: Messages, count: int, **sampling: Any) -> list[int]:
        """``count`` generated tokens, fewer where the end token comes; it is the last one then."""
        return list(self.model.generate(messages=messages, max_tokens=count, **sampling).tokens)

    def close(self) -> None:
        self.model.close()
        mx.clear_cache()
