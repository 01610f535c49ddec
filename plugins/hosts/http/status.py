"""``GET /health``, ``/v1/models`` and ``/metrics``."""

from typing import Annotated, Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.contract.results import ModelInfo
from mlx_onevision.plugins.hosts.http.errors import to_http_error
from mlx_onevision.plugins.hosts.http.middleware import Metrics
from mlx_onevision.plugins.hosts.http.openapi import WithKeys
from mlx_onevision.plugins.hosts.http.operations import JSON, TEXT, AppState, Operation

_KEYS = {
    "object": {"const": "model"},
    "created": {"type": "integer"},
    "owned_by": {"type": "string"},
    "root": {"type": "string"},
}
Known = Annotated[ModelInfo, WithKeys(_KEYS)]


class Health(TypedDict):
    """That it answers, whether weights are in memory, and how many requests there are."""

    status: Literal["ok"]
    loaded: bool
    active: int
    waiting: int


class Models(TypedDict):
    """The list of models, which has one."""

    object: Literal["list"]
    data: list[Known]


MODEL_DIED = PluginError(
    "internal", "the model cannot answer any more", "the server has to be started again"
)


async def health(state: AppState, _: Request) -> Response:
    """Answers 200 while it can answer, 503 when it has to be started again."""
    info = await state.blocking(state.backend.info)
    busy = {"loaded": info.loaded, "active": info.active, "waiting": info.waiting}
    if info.healthy:
        return JSONResponse({"status": "ok", **busy})
    return JSONResponse({"status": "failed", **busy, **to_http_error(MODEL_DIED).body}, 503)


async def models(state: AppState, _: Request) -> Response:
    """Answers with the list of models."""
    return JSONResponse({"object": "list", "data": [await _model(state)]})


async def model(state: AppState, request: Request) -> Response:
    """Answers with the model of a name. Raises HTTPError: 404 for any but the one served."""
    state.check_model(request.path_params["name"])
    return JSONResponse(await _model(state))


async def metrics(state: AppState, _: Request) -> Response:
    """Answers with the counts, as Prometheus reads them."""
    text = state.metrics.text(await state.blocking(state.backend.info))
    return PlainTextResponse(text, headers={"Content-Type": Metrics.CONTENT_TYPE})


async def _model(state: AppState) -> dict[str, Any]:
    """As OpenAI's; beside it everything of the contract's ModelInfo."""
    info = await state.blocking(state.backend.info)
    return {
        **info.to_dict(),
        "id": state.model,
        "object": "model",
        "created": state.created,
        "owned_by": "mlx-onevision",
        "root": info.id,  # as vLLM names it, whatever name it is served under
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
    Operation("GET", "/metrics", metrics, "metrics", "Counts for Prometheus", {TEXT: str}),
    Operation(
        "GET", "/v1/models", models, "listModels", "The model that is served", {JSON: Models}
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
