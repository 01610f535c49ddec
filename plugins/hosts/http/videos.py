"""``POST /v1/video/describe``: the contract's events, as server-sent ones of the same names."""

from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.events import ErrorEvent, Event
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http import streaming
from mlx_onevision.plugins.hosts.http.errors import without_places
from mlx_onevision.plugins.hosts.http.operations import EVENTS, Operation
from mlx_onevision.plugins.hosts.http.schemas import VideoRequest
from mlx_onevision.plugins.hosts.http.serving import Endpoint, Serving


def endpoint(serving: Serving) -> Endpoint:
    async def describe(request: Request) -> Response:
        asked = await serving.reader.read(request, VideoRequest)
        conversation.check_model(asked.model, serving.model)
        stream = serving.backend.describe_video(conversation.film(asked, serving.settings.told))
        return streaming.SentEvents(stream, _written, serving.settings.silence)

    return describe


def _written(event: Event) -> Iterator[bytes]:
    if isinstance(event, ErrorEvent):
        plain = PluginError(event.code, without_places(event.message), without_places(event.hint))
        event = ErrorEvent.of(plain)
    yield streaming.line(event.to_dict(), event.discriminator)


OPERATIONS = (
    Operation(
        "POST",
        "/v1/video/describe",
        endpoint,
        name="describeVideo",
        summary="A video, told segment by segment",
        takes=VideoRequest,
        gives={EVENTS: Event},
    ),
)
