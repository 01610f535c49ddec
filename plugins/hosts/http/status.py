"""``GET /health``, ``/v1/models`` and ``/metrics``."""

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from mlx_onevision.plugins.hosts.http import conversation
from mlx_onevision.plugins.hosts.http.metrics import TEXT
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
        return PlainTextResponse(serving.metrics.text(info), headers={"Content-Type": TEXT})

    return answer


def _model(serving: Serving) -> dict[str, object]:
    return {
        "id": serving.model,
        "object": "model",
        "created": serving.created,
        "owned_by": "mlx-onevision",
    }
