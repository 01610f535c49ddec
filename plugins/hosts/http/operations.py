"""What a route is, and the state that all routes share."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.middleware import Metrics
from mlx_onevision.plugins.hosts.http.request_body import BodyReader
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

Answer = TypeVar("Answer")

JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

DONE = "[DONE]"  # the last line of a stream of chat completions


@dataclass(eq=False)
class AppState:
    """A backend, and how it is served.

    model : the name it has for clients. created : seconds since 1970.
    threads : for calls that block; more than the backend takes on at once.
    openapi : the answer of ``/openapi.json``, once it was asked for.
    """

    backend: Backend
    settings: ServerSettings
    model: str
    created: int
    threads: Executor
    reader: BodyReader
    jobs: Jobs
    metrics: Metrics
    openapi: Response | None = None

    async def blocking(self, function: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)

    def check_model(self, name: str | None) -> None:
        """Raises HTTPError 404 for any model but the one served: none is loaded by its name."""
        if name is not None and name != self.model:
            message = "there is no such model; GET /v1/models says which"
            raise HTTPError(404, message, "model_not_found", "model")

    async def check_capabilities(
        self, wanted: GenerateRequest, *, logprobs: str, json_schema: str
    ) -> None:
        """Raises HTTPError 400 for what the backend cannot do, naming the request's field."""
        for capability, field in (("logprobs", logprobs), ("json_schema", json_schema)):
            if getattr(wanted, capability) is not None:
                info = await self.blocking(self.backend.info)
                if capability not in info.capabilities:
                    message = f"{field} is not supported by this model; leave it out"
                    raise HTTPError(400, message, param=field)


Handler = Callable[[AppState, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """One method of one path; declared beside its handler, listed in ``app``.

    path : as the router reads it; ``{name:path}`` takes slashes, too.
    name : ``operationId``. takes : the model of the body.
    gives : the type of each media type of a good answer; for an event stream, of an event's data.
    ends : the data of its last event, where that is no JSON.
    status : of a good answer. refuses : statuses of errors that only this route has.
    """

    method: str
    path: str
    handler: Handler
    name: str
    summary: str
    gives: Mapping[str, Any]
    takes: type[BaseModel] | None = None
    ends: str | None = None
    status: int = 200
    refuses: tuple[int, ...] = ()
