"""How videos become pixel values, which a checkpoint may say apart from images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_onevision.config.json_fields import Json
from mlx_onevision.config.model import ImageConfig, OneVisionConfig
from mlx_onevision.errors import ConfigError, RequestError
from mlx_onevision.files import read_json
from mlx_onevision.media.frame_sampling import FrameOptions

FILE = "video_preprocessor_config.json"


@dataclass(frozen=True)
class VideoConfig:
    """``pixels`` : size, mean and so on of a frame. ``frames`` : how many are taken of a video
    where the caller does not say; unset in the published checkpoints.
    """

    pixels: ImageConfig
    frames: FrameOptions = field(default_factory=FrameOptions)

    @classmethod
    def from_folder(
        cls, folder: Path, processor: Json, images: ImageConfig, config: OneVisionConfig
    ) -> "VideoConfig":
        """From ``video_processor`` of processor_config.json, else from the file of its own, else
        as images are.

        Raises:
            ConfigError: for a setting that is not supported.
        """
        where, values = "processor_config.json's video_processor", processor.get("video_processor")
        if not values:
            where, values = FILE, read_json(folder / FILE)
        if values is None:
            return cls(images)
        if not isinstance(values, Mapping):
            raise ConfigError("processor_config.json has a video_processor that is no object")
        return cls.from_dict(values, config, where)

    @classmethod
    def from_dict(cls, values: Json, config: OneVisionConfig, where: str = FILE) -> "VideoConfig":
        """Raises ConfigError for a setting that is not supported."""
        size = values.get("size")
        if isinstance(size, Mapping) and not size.keys() & {"height", "width"}:
            raise ConfigError(
                f"{where} has size {dict(size)}; a frame fills one tile, so it needs height and "
                "width"
            )
        pixels = {key: value for key, value in values.items() if key != "image_grid_pinpoints"}
        return cls(ImageConfig.from_dict(pixels, config, where), _frames(values, where))


def _frames(values: Json, where: str) -> FrameOptions:
    if not values.get("do_sample_frames"):
        return FrameOptions()
    given: dict[str, Any] = {key: values.get(key) for key in ("num_frames", "fps")}
    try:
        return FrameOptions(**given)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from None
