"""``GET /health``, ``/v1/models`` and ``/metrics``."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mlx_onevision.plugins.hosts.http import conversation
from mlx_onevision.plugins.hosts.http.metrics import TEXT as PROMETHEUS
from mlx_onevision.plugins.hosts.http.operations import JSON, TEXT, Operation
from mlx_onevision.plugins.hosts.http.serving import Endpoint, Serving


def health(serving: Serving) -> Endpoint:
    async def answer(_: Request) -> Response:
        info = await serving.blocking(serving.backend.info)
        busy = {"loaded": info.loaded, "active": info.active, "waiting": info.waiting}
        return JSONResponse({"status": "ok", **busy})

    return answer


def models(serving: Serving) -> Endpoint:
    async def answer(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(serving)]})

    return answer


def model(serving: Serving) -> Endpoint:
    async def answer(request: Request) -> Response:
        conversation.check_model(request.path_params["name"], serving.model)
        return JSONResponse(_model(serving))

    return answer


def metrics(serving: Serving) -> Endpoint:
    async def answer(_: Request) -> Response:
        info = await serving.blocking(serving.backend.info)
        return PlainTextResponse(serving.metrics.text(info), headers={"Content-Type": PROMETHEUS})

    return answer


def _model(serving: Serving) -> dict[str, object]:
    return {
        "id": serving.model,
        "object": "model",
        "created": serving.created,
        "owned_by": "mlx-onevision",
    }


OPERATIONS = (
    Operation(
        "GET",
        "/health",
        health,
        name="health",
        summary="Whether it answers, and how busy it is",
        gives={JSON: dict[str, Any]},
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
        gives={JSON: dict[str, Any]},
    ),
    Operation(
        "GET",
        "/v1/models/{name:path}",
        model,
        name="retrieveModel",
        summary="The model of a name, if it is the one served",
        gives={JSON: dict[str, Any]},
        refuses=(404,),
    ),
)
