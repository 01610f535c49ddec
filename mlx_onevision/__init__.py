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
    from mlx_onevision.captions import VideoDescription
    from mlx_onevision.description import DescriptionStream
    from mlx_onevision.errors import OneVisionError
    from mlx_onevision.generation import Generation, Stream, Usage
    from mlx_onevision.options import Options
    from mlx_onevision.plan import DescribeOptions
    from mlx_onevision.processor import Inputs
    from mlx_onevision.vectors import Embeddings

    __version__: str

__all__ = [
    "DescribeOptions",
    "DescriptionStream",
    "Embeddings",
    "Generation",
    "Inputs",
    "Model",
    "OneVisionError",
    "Options",
    "Stream",
    "Usage",
    "VideoDescription",
    "__version__",
    "load",
]

_HOMES = {
    "DescribeOptions": "plan",
    "DescriptionStream": "description",
    "Embeddings": "vectors",
    "Generation": "generation",
    "Inputs": "processor",
    "Model": "api",
    "OneVisionError": "errors",
    "Options": "options",
    "Stream": "generation",
    "Usage": "generation",
    "VideoDescription": "captions",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlx-onevision")
    if name in _HOMES:
        return getattr(import_module(f"mlx_onevision.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mlx_onevision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
