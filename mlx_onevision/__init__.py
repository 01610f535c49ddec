"""LLaVA-OneVision (arXiv 2408.03326) on Apple Silicon, in MLX: questions about images and videos,
answered with the tokens of transformers' implementation.

    from mlx_onevision import load

    model = load("demo")                 # or "0.5b", "7b", "72b", a folder, an id of the Hub
    answer = model.generate("What is in this image?", images=["shapes.png"], max_tokens=64)
    print(answer.text, answer.finish_reason, answer.usage.tokens_per_second)
    for piece in model.stream("And what moves?", videos=["clip.mp4"], num_frames=16):
        print(piece, end="", flush=True)
    for segment in model.describe_video("clip.mp4").segments:
        print(segment.start, segment.end, segment.text)
    vectors = model.embed(["a.png", "b.png"]).vectors       # float32 (2, dim), of length 1

``load`` returns a ``Model``, and help() of both says what they take:

- ``Options``: the settings of an answer, by name; ``Generation``: an answer, with its ``Usage``;
  ``Stream``: one on its way.
- ``DescribeOptions``, ``DescriptionStream``, ``VideoDescription``: the same of a described video.
- ``Embeddings``: vectors, with what makes them comparable.
- ``Inputs``: a prompt's token ids and pixels, as ``Model.prepare`` makes them.

Times are seconds, sizes of memory bytes, but ``memory_limit``, which is GB (1e9 bytes). Every
refusal is a ``OneVisionError`` with one sentence that says what to do, and a ``code`` for programs:
``RequestError``, ``ModelNotFoundError``, ``CheckpointError`` (of it ``ConfigError``),
``StorageError``, ``MediaError`` (of it ``TooLargeError``), ``ContextOverflowError``,
``OutOfMemoryError`` (of it ``MemoryLimitError``), ``CancelledError``, ``DiedError``.

Importing the package loads nothing else; the names are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_onevision.api import load
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
    from mlx_onevision.model import Model
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

# Where each name is defined.
_MODULES = {
    "DescribeOptions": "describe.options",
    "DescriptionStream": "describe.stream",
    "Embeddings": "embed.embeddings",
    "Generation": "engine.generation",
    "Inputs": "prompt.processor",
    "Model": "model",
    "Options": "engine.options",
    "Stream": "engine.generation",
    "Usage": "engine.generation",
    "VideoDescription": "describe.formats",
    "load": "api",
    **{name: "errors" for name in __all__ if name.endswith("Error")},
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("mlx-onevision")
    if name in _MODULES:
        return getattr(import_module(f"mlx_onevision.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'mlx_onevision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
