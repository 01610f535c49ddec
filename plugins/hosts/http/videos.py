"""``POST /v1/video/describe``: the contract's events, as server-sent ones of the same names."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import ErrorEvent, Event
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http import streaming
from mlx_onevision.plugins.hosts.http.errors import HTTPError, redact_paths
from mlx_onevision.plugins.hosts.http.openapi import Beside
from mlx_onevision.plugins.hosts.http.operations import EVENTS, JSON, Endpoint, Operation, Serving
from mlx_onevision.plugins.hosts.http.schemas import VideoRequest
from mlx_onevision.plugins.service.jobs import Job, Jobs, NoSuchJob

# ``/v1/video/jobs``: descriptions that are asked after, for clients whose calls are cut off.

PATH = "/v1/video/jobs"

Told = Annotated[
    Job,
    Beside(
        {"object": {"const": "video.job"}, "poll": {"type": "string", "format": "uri-reference"}}
    ),
]


def start(serving: Serving) -> Endpoint:
    async def answer(request: Request) -> Response:
        asked = await serving.reader.read(request, VideoRequest)
        conversation.check_model(asked.model, serving.model)
        wanted = conversation.film(asked, serving.settings.told)
        return await serving.blocking(lambda: _response(serving.jobs.start(wanted), 202))

    return answer


def status(serving: Serving) -> Endpoint:
    return _about(serving, Jobs.status)


def cancel(serving: Serving) -> Endpoint:
    return _about(serving, Jobs.cancel)


def _about(serving: Serving, look: Callable[[Jobs, str], Job]) -> Endpoint:
    async def answer(request: Request) -> Response:
        id = request.path_params["id"]
        try:
            return await serving.blocking(lambda: _response(look(serving.jobs, id)))
        except NoSuchJob as error:
            raise HTTPError(404, str(error), "not_found") from None

    return answer


def _response(job: Job, status: int = 200) -> Response:
    """A job as it stands, and where it is asked after."""
    if job.error is not None:
        error = job.error.error
        plain = PluginError(error.code, redact_paths(error.message), redact_paths(error.hint))
        job = replace(job, error=ErrorEvent.of(plain))
    place = f"{PATH}/{job.id}"
    body = {"object": "video.job", "poll": place, **job.to_dict()}
    return JSONResponse(body, status, {"Location": place})


def endpoint(serving: Serving) -> Endpoint:
    async def describe(request: Request) -> Response:
        asked = await serving.reader.read(request, VideoRequest)
        conversation.check_model(asked.model, serving.model)
        stream = serving.backend.describe_video(conversation.film(asked, serving.settings.told))
        return streaming.SentEvents(stream, _written, serving.settings.silence)

    return describe


def _written(event: Event) -> Iterator[bytes]:
    if isinstance(event, ErrorEvent):
        plain = PluginError(event.code, redact_paths(event.message), redact_paths(event.hint))
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
    Operation(
        "POST",
        PATH,
        start,
        name="startVideoJob",
        summary="A description of a video, to be asked after",
        takes=VideoRequest,
        gives={JSON: Told},
        status=202,
    ),
    Operation(
        "GET",
        PATH + "/{id}",
        status,
        name="retrieveVideoJob",
        summary="How far a description has come; its segments so far, its result or its error",
        gives={JSON: Told},
        refuses=(404,),
    ),
    Operation(
        "DELETE",
        PATH + "/{id}",
        cancel,
        name="cancelVideoJob",
        summary="End a description",
        gives={JSON: Told},
        refuses=(404,),
    ),
)
