"""The plugin contract: what a host may rely on, whatever answers behind it.

    with open_backend("engine", model="demo") as backend:
        image = Media("image", data=Path("a.jpg").read_bytes())
        for event in backend.generate(GenerateRequest.ask("What is this?", image)):
            if isinstance(event, TextEvent):
                print(event.delta, end="")

Everything that crosses over is a frozen dataclass with ``to_dict`` and ``from_dict``, or an
:class:`EventStream` of such; nothing of the model's (arrays, tensors, threads) ever does. The
contract has one version, ``API_VERSION``; objects of another are refused. Importing it imports the
standard library and nothing else.
"""

from typing import Any, Protocol, Self, runtime_checkable

from mlx_onevision.plugins.contract.errors import CODES, Code, PluginError
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Group,
    Media,
    Message,
    sniff,
)
from mlx_onevision.plugins.contract.results import (
    Capability,
    Chapter,
    DescribeResult,
    DoneEvent,
    EmbedResult,
    ErrorEvent,
    Event,
    GenerateResult,
    ModelInfo,
    ProgressEvent,
    Result,
    Segment,
    SegmentEvent,
    Space,
    TextEvent,
    TokenLogprob,
    TopLogprob,
    Usage,
    UsageEvent,
    event_from_dict,
)
from mlx_onevision.plugins.contract.streams import Channel, EventStream
from mlx_onevision.plugins.contract.wire import API_VERSION

__all__ = [
    "API_VERSION",
    "CODES",
    "Backend",
    "Capability",
    "Channel",
    "Chapter",
    "Code",
    "DescribeRequest",
    "DescribeResult",
    "DoneEvent",
    "EmbedRequest",
    "EmbedResult",
    "ErrorEvent",
    "Event",
    "EventStream",
    "GenerateRequest",
    "GenerateResult",
    "Group",
    "Media",
    "Message",
    "ModelInfo",
    "PluginError",
    "ProgressEvent",
    "Result",
    "Segment",
    "SegmentEvent",
    "Space",
    "TextEvent",
    "TokenLogprob",
    "TopLogprob",
    "Usage",
    "UsageEvent",
    "event_from_dict",
    "sniff",
]


@runtime_checkable
class Backend(Protocol):
    """A model that answers. Every method may be called from any thread, and many at once.

    A request that cannot be served never raises where it is made: its stream's last event is the
    error. Calls that return a stream return at once. In asyncio, call the others through
    ``asyncio.to_thread``.
    """

    def info(self) -> ModelInfo:
        """Which model it is. Reads no weights, but may have to download them. Raises PluginError:
        ``model_not_found``.
        """
        ...

    def generate(self, request: GenerateRequest) -> EventStream[GenerateResult]:
        """An answer, as it comes."""
        ...

    def embed(self, request: EmbedRequest) -> EmbedResult:
        """Vectors, waited for. Raises PluginError: for the first item that cannot be embedded,
        naming it.
        """
        ...

    def stream_embed(self, request: EmbedRequest) -> EventStream[EmbedResult]:
        """The same as a stream: of progress, that can be cancelled; vectors come with its end."""
        ...

    def describe_video(self, request: DescribeRequest) -> EventStream[DescribeResult]:
        """A video's segments, as they are done; then the whole."""
        ...

    def unload(self) -> None:
        """Frees the model's memory as soon as nothing is under way. The next request loads it
        again.
        """
        ...

    def close(self) -> None:
        """Cancels what is under way and frees everything. Requests after it are refused."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...
