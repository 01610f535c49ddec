"""From what a client sent to what the contract takes."""

from urllib.parse import unquote, urlsplit

from mlx_onevision.plugins.contract.errors import bad_request
from mlx_onevision.plugins.contract.requests import (
    DescribeRequest,
    EmbedRequest,
    GenerateRequest,
    Group,
    Kind,
    Media,
    Message,
    Role,
)
from mlx_onevision.plugins.hosts.http.content import (
    AnyItem,
    AnyPart,
    AssistantTurn,
    GroupPart,
    ImagePart,
    NamedImagePart,
    Place,
    ShownPart,
    SystemTurn,
    TextPart,
    UserTurn,
    VideoPart,
    schema_text,
)
from mlx_onevision.plugins.hosts.http.errors import HTTPError
from mlx_onevision.plugins.hosts.http.schemas import (
    LOGPROBS,
    ChatRequest,
    EmbeddingsRequest,
    Looking,
    ResponsesRequest,
    Sampling,
    VideoRequest,
)

SAMPLING = tuple(Sampling.model_fields)
LOOKING = tuple(Looking.model_fields)  # and with it SAMPLING
DESCRIBING = ("segments", "start", "end", "num_frames", "longest", "system")


def check_model(named: str | None, served: str) -> None:
    """Raises HTTPFault 404 for any model but the one served: none is ever loaded by its name."""
    if named is not None and named != served:
        raise HTTPError(
            404, "there is no such model; GET /v1/models says which", "model_not_found", "model"
        )


def question(asked: ChatRequest, unsaid: int) -> GenerateRequest:
    """unsaid : tokens of the answer at most, where the request says nothing.

    Raises PluginError for what the contract does not take, as a conversation that is empty.
    """
    most = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    return GenerateRequest(
        messages=[_message(turn) for turn in asked.messages],
        max_tokens=unsaid if most is None else most,
        stop=tuple(asked.stop or ()),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        json_schema=schema_text(asked.response_format),
        **{name: getattr(asked, name) for name in LOOKING},
    )


def response_question(asked: ResponsesRequest, unsaid: int) -> GenerateRequest:
    """As :func:`question`."""
    most = asked.max_output_tokens
    told = LOGPROBS in (asked.include or ()) or asked.top_logprobs
    return GenerateRequest(
        messages=_instructed(asked.instructions, [_message(turn) for turn in asked.input]),
        max_tokens=unsaid if most is None else most,
        logprobs=(asked.top_logprobs or 0) if told else None,
        json_schema=schema_text(asked.text.format if asked.text else None),
        **{name: getattr(asked, name) for name in LOOKING},
    )


def items(asked: EmbeddingsRequest) -> EmbedRequest:
    """Raises PluginError."""
    return EmbedRequest(
        items=[_item(item) for item in asked.input],
        **{name: getattr(asked, name) for name in ("space", "normalize", "tiling", "timeout")},
    )


def film(asked: VideoRequest, unsaid: int) -> DescribeRequest:
    """unsaid : tokens of each segment's text at most, where the request says nothing.

    Raises PluginError.
    """
    return DescribeRequest(
        video=_media("video", asked.video),
        max_tokens=unsaid if asked.max_tokens is None else asked.max_tokens,
        **{name: getattr(asked, name) for name in (*SAMPLING, *DESCRIBING, "timeout")},
    )


def _instructed(instructions: str | None, messages: list[Message]) -> list[Message]:
    """The model knows one system message: what there is besides instructions goes into it."""
    if instructions is None:
        return messages
    told = instructions
    if messages[0].role == "system":
        first = messages.pop(0)
        told = f"{told}\n\n{''.join(part for part in first.parts if isinstance(part, str))}"
    return [Message("system", told), *messages]


def _message(turn: SystemTurn | UserTurn | AssistantTurn) -> Message:
    role: Role = "system" if turn.role == "developer" else turn.role
    return Message(role, [_part(part) for part in turn.content])


def _item(item: AnyItem) -> str | Group | Media:
    if isinstance(item, GroupPart):
        return Group([_shown(part) for part in item.content])
    return _part(item)


def _part(part: AnyPart) -> str | Media:
    return part.text if isinstance(part, TextPart) else _shown(part)


def _shown(part: ShownPart) -> Media:
    if isinstance(part, ImagePart):
        return _media("image", part.image_url)
    if isinstance(part, NamedImagePart):
        return _media("image", part.image)
    return _media("video", part.video_url if isinstance(part, VideoPart) else part.video)


def _media(kind: Kind, place: Place) -> Media:
    """A path where it is one; whether it is read at all is for the policy to say."""
    url = place.url
    if url[:5].lower() == "file:":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise bad_request(f"the address of the {kind} is not one of this machine")
        return Media(kind, path=unquote(parts.path))
    return Media(kind, path=url) if url.startswith("/") else Media(kind, url=url)
