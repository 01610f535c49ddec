"""``/v1/video/jobs``: descriptions that are asked after, for clients whose calls are cut off."""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.events import ErrorEvent
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http.errors import HTTPFault, without_places
from mlx_onevision.plugins.hosts.http.json_schemas import Beside
from mlx_onevision.plugins.hosts.http.operations import JSON, Operation
from mlx_onevision.plugins.hosts.http.schemas import VideoRequest
from mlx_onevision.plugins.hosts.http.serving import Endpoint, Serving
from mlx_onevision.plugins.service.jobs import Job, Jobs, NoSuchJob

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
            raise HTTPFault(404, str(error), "not_found") from None

    return answer


def _response(job: Job, status: int = 200) -> Response:
    """A job as it stands, and where it is asked after."""
    if job.error is not None:
        error = job.error.error
        plain = PluginError(error.code, without_places(error.message), without_places(error.hint))
        job = replace(job, error=ErrorEvent.of(plain))
    place = f"{PATH}/{job.id}"
    body = {"object": "video.job", "poll": place, **job.to_dict()}
    return JSONResponse(body, status, {"Location": place})


OPERATIONS = (
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
