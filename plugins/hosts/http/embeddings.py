"""``POST /v1/embeddings``."""

import base64
import struct
from collections.abc import Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.requests import EmbedRequest
from mlx_onevision.plugins.contract.results import EmbedResult
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.operations import JSON, AppState, Operation, result
from mlx_onevision.plugins.hosts.http.response_types import Embeddings
from mlx_onevision.plugins.hosts.http.schemas import EmbeddingsRequest


async def embeddings(state: AppState, request: Request) -> Response:
    """Answers with a vector for each item of the input."""
    asked, wanted = await state.reader.read(request, EmbeddingsRequest, partial(_prepare, state))
    if asked.dimensions is not None:
        info = await state.blocking(state.backend.info)
        dim = {space.id: space.dim for space in info.spaces}.get(asked.space)
        if asked.dimensions != dim:
            why = f"vectors of the space {asked.space} have {dim} dimensions"
            message = f"{why} and cannot be shortened; leave dimensions out"
            raise HTTPError(400, message, param="dimensions")
    stream = state.backend.stream_embed(wanted)
    state.reader.release_after(request.scope, [stream])
    found = await result(stream, request.receive)
    # Thousands of numbers take a while to write.
    return await state.blocking(lambda: JSONResponse(_body(found, asked, state.model)))


def _prepare(state: AppState, asked: EmbeddingsRequest) -> tuple[EmbeddingsRequest, EmbedRequest]:
    state.check_model(asked.model)
    wanted = EmbedRequest(
        items=[item.to_contract() for item in asked.input],
        space=asked.space,
        normalize=asked.normalize,
        tiling=asked.tiling,
        timeout=asked.timeout,
    )
    return asked, wanted


def _body(found: EmbedResult, asked: EmbeddingsRequest, model: str) -> Embeddings:
    encode = _base64 if asked.encoding_format == "base64" else list[float]
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(found.vectors)
        ],
        "usage": {"prompt_tokens": 0, "total_tokens": 0},  # backends do not count them
        "space": found.space,
        "dim": found.dim,
        "revision": found.revision,
        "quantization": found.quantization,
        "method": found.method,
        "normalized": found.normalized,
    }


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


OPERATION = Operation(
    "POST",
    "/v1/embeddings",
    embeddings,
    name="createEmbedding",
    summary="Vectors of texts, images and videos",
    takes=EmbeddingsRequest,
    gives={JSON: Embeddings},
)
