"""LLaVA-OneVision on Apple Silicon, in MLX: images and text in, the reference's exact tokens out.

    from mlx_onevision import load

    model = load("demo")
    print(model.generate("What is in this image?", images=["shapes.png"]).text)

Importing this loads nothing else; the names below are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_onevision.api import Model, load
    from mlx_onevision.describe.formats import VideoDescription
    from mlx_onevision.describe.options import DescribeOptions
    from mlx_onevision.describe.stream import DescriptionStream
    from mlx_onevision.embed.embeddings import Embeddings
    from mlx_onevision.engine.generation import Generation, Stream, Usage
    from mlx_onevision.engine.options import Options
    from mlx_onevision.errors import (
        CancelledError,
        CheckpointError,
        ConfigError,
        ContextOverflowError,
        DiedError,
        MediaError,
        MemoryLimitError,
        ModelNotFoundError,
        OneVisionError,
        OutOfMemoryError,
        RequestError,
        StorageError,
        TooLargeError,
    )
    from mlx_onevision.prompt.processor import Inputs

    __version__: str

__all__ = [
    "CancelledError",
    "CheckpointError",
    "ConfigError",
    "ContextOverflowError",
    "DescribeOptions",
    "DescriptionStream",
    "DiedError",
    "Embeddings",
    "Generation",
    "Inputs",
    "MediaError",
    "MemoryLimitError",
    "Model",
    "ModelNotFoundError",
    "OneVisionError",
    "Options",
    "OutOfMemoryError",
    "RequestError",
    "StorageError",
    "Stream",
    "TooLargeError",
    "Usage",
    "VideoDescription",
    "__version__",
    "load",
]

_HOMES = {
    "DescribeOptions": "describe.options",
    "DescriptionStream": "describe.stream",
    "Embeddings": "embed.embeddings",
    "Generation": "engine.generation",
    "Inputs": "prompt.processor",
    "Model": "api",
    "Options": "engine.options",
    "Stream": "engine.generation",
    "Usage": "engine.generation",
    "VideoDescription": "describe.formats",
    "load": "api",
}
_HOMES |= {name: "errors" for name in __all__ if name.endswith("Error")}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlx-onevision")
    if name in _HOMES:
        return getattr(import_module(f"mlx_onevision.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mlx_onevision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
