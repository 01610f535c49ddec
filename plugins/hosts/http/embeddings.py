"""``POST /v1/embeddings``."""

import base64
import struct
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.results import EmbedResult
from mlx_onevision.plugins.hosts.http import conversion as conversation
from mlx_onevision.plugins.hosts.http import streaming
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.operations import JSON, Endpoint, Operation, Serving
from mlx_onevision.plugins.hosts.http.response_types import Embeddings
from mlx_onevision.plugins.hosts.http.schemas import EmbeddingsRequest


def endpoint(serving: Serving) -> Endpoint:
    async def embeddings(request: Request) -> Response:
        asked = await serving.reader.read(request, EmbeddingsRequest)
        conversation.check_model(asked.model, serving.model)
        wanted = conversation.items(asked)
        await _check_dimensions(serving, asked)
        found = await streaming.result(serving.backend.stream_embed(wanted), request.receive)
        # Thousands of numbers take a while to write.
        return await serving.blocking(lambda: JSONResponse(_body(found, asked, serving.model)))

    return embeddings


async def _check_dimensions(serving: Serving, asked: EmbeddingsRequest) -> None:
    if asked.dimensions is None:
        return
    info = await serving.blocking(serving.backend.info)
    dims = {space.id: space.dim for space in info.spaces}
    if asked.dimensions != dims.get(asked.space):
        raise HTTPError(
            400,
            f"vectors of the space {asked.space} have {dims.get(asked.space)} dimensions and "
            "cannot be shortened; leave dimensions out",
            param="dimensions",
        )


def _body(found: EmbedResult, asked: EmbeddingsRequest, model: str) -> Embeddings:
    encode = _base64 if asked.encoding_format == "base64" else _numbers
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(found.vectors)
        ],
        # Backends do not count them.
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
        # Vectors mean the same only if these agree.
        "space": found.space,
        "dim": found.dim,
        "revision": found.revision,
        "quantization": found.quantization,
        "method": found.method,
        "normalized": found.normalized,
    }


def _numbers(vector: Sequence[float]) -> list[float]:
    return list(vector)


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


OPERATION = Operation(
    "POST",
    "/v1/embeddings",
    endpoint,
    name="createEmbedding",
    summary="Vectors of texts, pictures and videos",
    takes=EmbeddingsRequest,
    gives={JSON: Embeddings},
)
