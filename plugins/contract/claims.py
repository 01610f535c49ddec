"""What a backend does not claim it refuses; standard library only."""

from collections.abc import Iterator, Sequence

from mlx_onevision.plugins.contract.errors import PluginError, bad_request
from mlx_onevision.plugins.contract.requests import DescribeRequest, EmbedRequest, GenerateRequest
from mlx_onevision.plugins.contract.results import Capability


def refuse_unclaimed(
    request: GenerateRequest | EmbedRequest | DescribeRequest, claimed: Sequence[Capability]
) -> None:
    """Raises PluginError for a request that needs something which is not among ``claimed``."""
    for need in _needs(request):
        if need in claimed:
            continue
        if need in ("images", "videos"):
            raise PluginError("unsupported_media", f"{need} are not taken here", "ask without them")
        raise bad_request(f"there is no {need} here", "see the capabilities of info()")


def _needs(request: GenerateRequest | EmbedRequest | DescribeRequest) -> Iterator[Capability]:
    if isinstance(request, EmbedRequest):
        yield "embed"
    elif isinstance(request, DescribeRequest):
        yield "describe_video"
    else:
        yield "generate"
        if request.logprobs is not None:
            yield "logprobs"
        if request.json_schema is not None:
            yield "json_schema"
    for medium in request.media:
        yield "images" if medium.kind == "image" else "videos"
