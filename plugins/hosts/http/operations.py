"""What a route is: how it is reached, what answers, and what the OpenAPI file says of it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mlx_onevision.plugins.contract.errors import PluginError, to_plugin_error
from mlx_onevision.plugins.contract.requests import GenerateRequest
from mlx_onevision.plugins.contract.results import Capability
from mlx_onevision.plugins.hosts.http.errors import HTTPError, refusal
from mlx_onevision.plugins.hosts.http.middleware import Metrics
from mlx_onevision.plugins.hosts.http.request_body import Reader
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

# What every route needs, and what every route does about errors.

Answer = TypeVar("Answer")
Endpoint = Callable[[Request], Awaitable[Response]]

GONE = 499  # as other servers write it in their logs; nobody is there to read it

logger = logging.getLogger("mlx_onevision")


@dataclass(frozen=True)
class Serving:
    """A backend, and how it is served.

    model : the name it has for clients. created : seconds since 1970.
    threads : for calls that block; more than the backend takes on at once, so that the one after
        the last is refused at once.
    """

    backend: Backend
    settings: ServerSettings
    model: str
    created: int
    threads: Executor
    reader: Reader
    jobs: Jobs
    metrics: Metrics = field(default_factory=Metrics)

    async def blocking(self, function: Callable[[], Answer]) -> Answer:
        """Calls a function that waits, elsewhere."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)


def answered(endpoint: Endpoint) -> Endpoint:
    """``endpoint``, whose errors are answers."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPError as fault:
            # What is left of a body that was refused is not read.
            unread = fault.status in (408, 413, 415, 429)
            return fault.response({"Connection": "close"} if unread else None)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except PluginError as error:
            return refusal(error)
        except Exception as error:
            return refusal(to_plugin_error(error))

    return answer


JSON = "application/json"
EVENTS = "text/event-stream"
TEXT = "text/plain"

DONE = "[DONE]"
"""The last line of a stream of chat completions, which is no JSON."""


@dataclass(frozen=True)
class Operation:
    """One method of one path; declared beside what answers it, listed in ``app``.

    path : as the router reads it; ``{name:path}`` takes slashes, too.
    make : the endpoint, over a backend.
    name : ``operationId``, for clients that are made from the file.
    summary : one line for people.
    takes : what the body is checked with; None where there is none.
    gives : of each media type of a good answer what it holds: anything pydantic has a schema for.
        Of an event stream it is what the data of each event holds.
    ends : the data of its last event, where that is no JSON.
    status : of a good answer.
    refuses : statuses of errors that this route has beside those of every route, and of every route
        that takes a body.
    """

    method: str
    path: str
    make: Callable[[Serving], Endpoint]
    name: str
    summary: str
    gives: Mapping[str, Any]
    takes: type[BaseModel] | None = None
    ends: str | None = None
    status: int = 200
    refuses: tuple[int, ...] = ()


# What not every backend can do is asked for only where it can.


async def check_able(
    serving: Serving, wanted: GenerateRequest, *, logprobs: str, json_schema: str
) -> None:
    """Raises HTTPFault 400, by the name of the field that asked for what the backend does not
    claim.
    """
    named: dict[Capability, str] = {"logprobs": logprobs, "json_schema": json_schema}
    asked = {one: name for one, name in named.items() if getattr(wanted, one) is not None}
    if not asked:
        return
    info = await serving.blocking(serving.backend.info)
    for capability, name in asked.items():
        if capability not in info.capabilities:
            message = f"{name} is not supported by this model; leave it out"
            raise HTTPError(400, message, param=name)
