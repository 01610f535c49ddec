"""How images become tiles: the settings of preprocessor_config.json."""

from dataclasses import dataclass
from typing import Any

from mlx_onevision.config.json_fields import Json, Reader, is_array, is_number, is_object, shown
from mlx_onevision.config.model import DEFAULT_PINPOINTS, OneVisionConfig, read_pinpoints
from mlx_onevision.errors import ConfigError


@dataclass(frozen=True)
class ImageConfig:
    """How images become pixel values. ``size`` is the side of a tile in pixels; mean and standard
    deviation are of values from 0 to 1, red, green and blue.
    """

    size: int = 384
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    image_grid_pinpoints: tuple[tuple[int, int], ...] = DEFAULT_PINPOINTS

    @classmethod
    def from_dict(
        cls, values: Json | None, config: OneVisionConfig, where: str = "preprocessor_config.json"
    ) -> "ImageConfig":
        """From preprocessor_config.json (None for a checkpoint without one, such as lmms-lab's).

        where : what errors call the file.

        Raises:
            ConfigError: for a step that the file switches off or changes, and for a tile size or
                grid list that differs from the model's, because token counts and features would
                then disagree.
        """
        size = config.vision_config.image_size
        if values is None:
            return cls(size=size, image_grid_pinpoints=config.image_grid_pinpoints)
        for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if values.get(step) is False:
                raise ConfigError(f"{where} switches {step} off, which is not supported")
        if values.get("do_center_crop"):
            raise ConfigError(f"{where} asks for do_center_crop, which is not supported")
        if values.get("resample", 3) != 3:
            raise ConfigError(
                f"{where} asks for resample {shown(values['resample'])}; only 3 (bicubic) is "
                "supported"
            )
        given = values.get("size", size)
        edges = list(given.values()) if is_object(given) else [given]
        if any(edge != size for edge in edges):
            raise ConfigError(
                f"{where} has tiles of {shown(given)}, config.json of {size} pixels; they must "
                "agree"
            )
        pinpoints = config.image_grid_pinpoints
        if values.get("image_grid_pinpoints") is not None:
            pinpoints = read_pinpoints(values["image_grid_pinpoints"], size, where)
            if pinpoints != config.image_grid_pinpoints:
                raise ConfigError(f"{where} and config.json list different image_grid_pinpoints")
        # A file without mean and std gets the reference class's values, which are CLIP's.
        mean = values.get("image_mean") or (0.48145466, 0.4578275, 0.40821073)
        std = values.get("image_std") or (0.26862954, 0.26130258, 0.27577711)
        return cls(
            size=size,
            image_mean=_three(mean, f"{where} image_mean", positive=False),
            image_std=_three(std, f"{where} image_std", positive=True),
            rescale_factor=Reader(values, where).positive("rescale_factor", 1 / 255),
            image_grid_pinpoints=pinpoints,
        )


def _three(given: Any, where: str, *, positive: bool) -> tuple[float, float, float]:
    numbers = given if is_array(given) else [given] * 3
    if len(numbers) != 3 or not all(is_number(n) and (n > 0 or not positive) for n in numbers):
        raise ConfigError(f"{where} is {shown(given)}, not three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
