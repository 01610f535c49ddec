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

# ruff: noqa: I001 (a name as itself is a name for others)

from typing import Any, Protocol, Self, runtime_checkable

from mlx_onevision.plugins.contract.errors import (
    CODES as CODES,
    Code as Code,
    PluginError as PluginError,
)
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest as DescribeRequest,
    EmbedRequest as EmbedRequest,
    GenerateRequest as GenerateRequest,
    Group as Group,
    Media as Media,
    Message as Message,
    TokenBias as TokenBias,
    sniff as sniff,
)
from mlx_onevision.plugins.contract.results import (
    Capability as Capability,
    Chapter as Chapter,
    DescribeResult as DescribeResult,
    DoneEvent as DoneEvent,
    EmbedResult as EmbedResult,
    ErrorEvent as ErrorEvent,
    Event as Event,
    GenerateResult as GenerateResult,
    ModelInfo as ModelInfo,
    ProgressEvent as ProgressEvent,
    Result as Result,
    Segment as Segment,
    SegmentEvent as SegmentEvent,
    Space as Space,
    TextEvent as TextEvent,
    TokenLogprob as TokenLogprob,
    TopLogprob as TopLogprob,
    Usage as Usage,
    UsageEvent as UsageEvent,
    event_from_dict as event_from_dict,
)
from mlx_onevision.plugins.contract.streams import Channel as Channel, EventStream as EventStream
from mlx_onevision.plugins.contract.wire import API_VERSION as API_VERSION


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
