"""``POST /v1/video/describe``: the contract's events, as server-sent ones of the same names; and
``/v1/video/jobs``: descriptions that are polled for, for clients whose calls are cut off.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.requests import DescribeRequest
from mlx_onevision.plugins.contract.results import ErrorEvent, Event
from mlx_onevision.plugins.hosts.http.errors import HTTPError, redact_error
from mlx_onevision.plugins.hosts.http.openapi import WithKeys
from mlx_onevision.plugins.hosts.http.operations import (
    EVENTS,
    JSON,
    AppState,
    Operation,
    SentEvents,
    line,
)
from mlx_onevision.plugins.hosts.http.schemas import Sampling, VideoRequest
from mlx_onevision.plugins.service.jobs import Job, Jobs, NoSuchJob

PATH = "/v1/video/jobs"

_KEYS = {"object": {"const": "video.job"}, "poll": {"type": "string", "format": "uri-reference"}}
JobBody = Annotated[Job, WithKeys(_KEYS)]

_FIELDS = ("segments", "start", "end", "num_frames", "longest", "system", "timeout")


async def describe(state: AppState, request: Request) -> Response:
    """Describes a video, and sends the contract's events."""
    stream = state.backend.describe_video(await _read(state, request))
    state.reader.release_after(request.scope, [stream])
    return SentEvents([stream], _written, state.settings.keep_alive_interval)


async def start(state: AppState, request: Request) -> Response:
    """Begins a description, and answers where it is polled for."""
    wanted = await _read(state, request)
    return await state.blocking(lambda: _response(state.jobs.start(wanted), 202))


async def _read(state: AppState, request: Request) -> DescribeRequest:
    def prepare(asked: VideoRequest) -> DescribeRequest:
        state.check_model(asked.model)
        return DescribeRequest(
            video=asked.video.media("video"),
            max_tokens=asked.max_tokens or state.settings.default_segment_tokens,
            **{name: getattr(asked, name) for name in (*Sampling.model_fields, *_FIELDS)},
        )

    return await state.reader.read(request, VideoRequest, prepare)


async def _of_job(call: Callable[[Jobs, str], Job], state: AppState, request: Request) -> Response:
    id = request.path_params["id"]
    try:
        return await state.blocking(lambda: _response(call(state.jobs, id)))
    except NoSuchJob as error:
        raise HTTPError(404, str(error), "not_found") from None


def _response(job: Job, status: int = 200) -> Response:
    if job.error is not None:
        job = replace(job, error=ErrorEvent.of(redact_error(job.error.error)))
    path = f"{PATH}/{job.id}"
    body = {"object": "video.job", "poll": path, **job.to_dict()}
    return JSONResponse(body, status, {"Location": path})


def _written(event: Event, _: int) -> Iterator[bytes]:
    if isinstance(event, ErrorEvent):
        event = ErrorEvent.of(redact_error(event.error))
    yield line(event.to_dict(), event.discriminator)


OPERATIONS = (
    Operation(
        "POST",
        "/v1/video/describe",
        describe,
        name="describeVideo",
        summary="A video, described segment by segment",
        takes=VideoRequest,
        gives={EVENTS: Event},
    ),
    Operation(
        "POST",
        PATH,
        start,
        name="startVideoJob",
        summary="A description of a video, to be polled for",
        takes=VideoRequest,
        gives={JSON: JobBody},
        status=202,
    ),
    Operation(
        "GET",
        PATH + "/{id}",
        partial(_of_job, Jobs.status),
        name="retrieveVideoJob",
        summary="How far a description has come; its segments so far, its result or its error",
        gives={JSON: JobBody},
        refuses=(404,),
    ),
    Operation(
        "DELETE",
        PATH + "/{id}",
        partial(_of_job, Jobs.cancel),
        name="cancelVideoJob",
        summary="End a description",
        gives={JSON: JobBody},
        refuses=(404,),
    ),
)
