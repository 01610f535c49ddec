"""From what a client sent to what the contract takes."""

from urllib.parse import unquote, urlsplit

from mlx_onevision.plugins.errors import bad_request
from mlx_onevision.plugins.hosts.http.faults import HTTPFault
from mlx_onevision.plugins.hosts.http.schemas import (
    AnyItem,
    AnyPart,
    ChatRequest,
    EmbeddingsRequest,
    GroupPart,
    ImagePart,
    Place,
    Sampling,
    TextPart,
    Turn,
    VideoPart,
    VideoRequest,
)
from mlx_onevision.plugins.media import Kind, Media, Message, Role
from mlx_onevision.plugins.requests import DescribeRequest, EmbedRequest, GenerateRequest, Group

MAX_TOKENS = 1024  # of an answer for which nothing is said

SAMPLING = tuple(Sampling.model_fields)
LOOKING = ("num_frames", "fps", "start", "end", "tiling", "order", "timeout")
DESCRIBING = ("segments", "start", "end", "num_frames", "longest", "max_tokens", "system")


def check_model(named: str | None, served: str) -> None:
    """Raises HTTPFault 404 for any model but the one served: none is ever loaded by its name."""
    if named is not None and named != served:
        raise HTTPFault(
            404, "there is no such model; GET /v1/models says which", "model_not_found", "model"
        )


def question(asked: ChatRequest) -> GenerateRequest:
    """Raises PluginError for a number out of range and a conversation that is none."""
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    return GenerateRequest(
        messages=[_message(turn) for turn in asked.messages],
        max_tokens=MAX_TOKENS if most is None else most,
        stop=tuple(asked.stop or ()),
        **{name: getattr(asked, name) for name in (*SAMPLING, *LOOKING)},
    )


def items(asked: EmbeddingsRequest) -> EmbedRequest:
    """Raises PluginError."""
    return EmbedRequest(
        items=[_item(item) for item in asked.input],
        **{name: getattr(asked, name) for name in ("space", "normalize", "tiling", "timeout")},
    )


def film(asked: VideoRequest) -> DescribeRequest:
    """Raises PluginError."""
    return DescribeRequest(
        video=_media("video", asked.video),
        **{name: getattr(asked, name) for name in (*SAMPLING, *DESCRIBING, "timeout")},
    )


def _message(turn: Turn) -> Message:
    role: Role = "system" if turn.role == "developer" else turn.role
    parts = [_part(part) for part in turn.content]
    if role != "user" and any(isinstance(part, Media) for part in parts):
        raise bad_request(f"a message of the {role} holds a picture or a video", "only users show")
    return Message(role, parts)


def _item(item: AnyItem) -> str | Group | Media:
    if isinstance(item, GroupPart):
        return Group([_shown(part) for part in item.content])
    return _part(item)


def _part(part: AnyPart) -> str | Media:
    return part.text if isinstance(part, TextPart) else _shown(part)


def _shown(part: ImagePart | VideoPart) -> Media:
    if isinstance(part, ImagePart):
        return _media("image", part.image_url)
    return _media("video", part.video_url)


def _media(kind: Kind, place: Place) -> Media:
    """A path where it is one; whether it is read at all is for the policy to say."""
    url = place.url
    if url[:5].lower() == "file:":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise bad_request(f"the address of the {kind} is not one of this machine")
        return Media(kind, path=unquote(parts.path))
    return Media(kind, path=url) if url.startswith("/") else Media(kind, url=url)
