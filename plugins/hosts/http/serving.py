"""What every route needs, and what every route does about errors."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.wording import worded
from mlx_onevision.plugins.hosts.http.errors import HTTPFault, refusal
from mlx_onevision.plugins.hosts.http.metrics import Metrics
from mlx_onevision.plugins.hosts.http.request_body import Reader
from mlx_onevision.plugins.hosts.http.settings import ServerSettings
from mlx_onevision.plugins.interface import Backend
from mlx_onevision.plugins.service.jobs import Jobs

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
        except HTTPFault as fault:
            # What is left of a body that was refused is not read.
            unread = fault.status in (408, 413, 415, 429)
            return fault.response({"Connection": "close"} if unread else None)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except PluginError as error:
            return refusal(error)
        except Exception as error:
            return refusal(worded(error))

    return answer
