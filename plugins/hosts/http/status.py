"""``GET /health``, ``/v1/models`` and ``/metrics``."""

from typing import Annotated, Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import ModelInfo
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http.errors import error_body
from mlx_onevision.plugins.hosts.http.middleware import TEXT as PROMETHEUS
from mlx_onevision.plugins.hosts.http.openapi import Beside
from mlx_onevision.plugins.hosts.http.operations import JSON, TEXT, Endpoint, Operation, Serving

Known = Annotated[
    ModelInfo,
    Beside(
        {
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "root": {"type": "string"},
        }
    ),
]


class Health(TypedDict):
    status: Literal["ok"]
    loaded: bool
    active: int
    waiting: int


class Models(TypedDict):
    object: Literal["list"]
    data: list[Known]


DEAD = PluginError(
    "internal", "the model cannot answer any more", "the server has to be started again"
)


def health(serving: Serving) -> Endpoint:
    async def answer(_: Request) -> Response:
        info = await serving.blocking(serving.backend.info)
        busy = {"loaded": info.loaded, "active": info.active, "waiting": info.waiting}
        if info.healthy:
            return JSONResponse({"status": "ok", **busy})
        return JSONResponse({"status": "failed", **busy, **error_body(DEAD)}, 503)

    return answer


def models(serving: Serving) -> Endpoint:
    async def answer(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [await _model(serving)]})

    return answer


def model(serving: Serving) -> Endpoint:
    async def answer(request: Request) -> Response:
        conversation.check_model(request.path_params["name"], serving.model)
        return JSONResponse(await _model(serving))

    return answer


def metrics(serving: Serving) -> Endpoint:
    async def answer(_: Request) -> Response:
        info = await serving.blocking(serving.backend.info)
        return PlainTextResponse(serving.metrics.text(info), headers={"Content-Type": PROMETHEUS})

    return answer


async def _model(serving: Serving) -> dict[str, Any]:
    """As OpenAI's; beside it all that the contract says of a model."""
    info = await serving.blocking(serving.backend.info)
    return {
        **info.to_dict(),
        "id": serving.model,
        "object": "model",
        "created": serving.created,
        "owned_by": "mlx-onevision",
        "root": info.id,  # as vLLM says what it is, whatever name it is served under
    }


OPERATIONS = (
    Operation(
        "GET",
        "/health",
        health,
        name="health",
        summary="Whether it answers, and how busy it is",
        gives={JSON: Health},
        refuses=(503,),
    ),
    Operation(
        "GET",
        "/metrics",
        metrics,
        name="metrics",
        summary="Counts for Prometheus",
        gives={TEXT: str},
    ),
    Operation(
        "GET",
        "/v1/models",
        models,
        name="listModels",
        summary="The model that is served",
        gives={JSON: Models},
    ),
    Operation(
        "GET",
        "/v1/models/{name:path}",
        model,
        name="retrieveModel",
        summary="The model of a name, if it is the one served",
        gives={JSON: Known},
        refuses=(404,),
    ),
)
