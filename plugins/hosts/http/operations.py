"""What a route is: how it is reached, what answers, and what the OpenAPI file says of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from mlx_onevision.plugins.hosts.http.serving import Endpoint, Serving

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
