"""Messages and their parts: what requests hold, made the contract's. All routes take the names of
parts of any of OpenAI's routes, of vLLM and of mlx-vlm.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_onevision.plugins.contract.errors import bad_request
from mlx_onevision.plugins.contract.requests import Group, Kind, Media, Message
from mlx_onevision.plugins.contract.wire import is_list, is_object

MAX_IMAGES_PER_GROUP = 256  # images in a group, at most
# Messages and parts of a conversation; each message takes five tokens or more.
MAX_MESSAGES_AND_PARTS = 8192

# The forms of addresses and paths that are taken; the media policy decides which of them may be
# read.
_URL = r"^([dD][aA][tT][aA]:|upload:|[hH][tT][tT][pP][sS]?://|[fF][iI][lL][eE]:/|/)"


class Strict(BaseModel):
    """No "1" for 1, no infinity, nothing dropped without an error but unknown fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


# Names that other servers have for what belongs into the content, and that would be read over here.
MISPLACED_NAMES = frozenset(
    "image images image_url image_urls input_image input_images video videos video_url video_urls "
    "input_video audio audio_url input_audio file files file_ids attachments documents media parts "
    "experimental_attachments".split()
)
CONTENT_HINT = 'images and videos are parts of content, {"type": "image_url", "image_url": …}'


class RejectMisplacedContent(Strict):
    """Refuses content under names that would be read over.

    elsewhere : these names, but for fields. hint : where it belongs.
    """

    elsewhere: ClassVar[frozenset[str]] = MISPLACED_NAMES
    hint: ClassVar[str] = CONTENT_HINT

    @model_validator(mode="before")
    @classmethod
    def _refuse_content_elsewhere(cls, values: Any) -> Any:
        if is_object(values) and cls._is_type(values.get("type")):
            for name in sorted(cls._misplaced() & values.keys()):
                if values[name]:
                    raise ValueError(f"{name} is not read here; {cls.hint}")
        return values

    @classmethod
    def _is_type(cls, kind: Any) -> bool:
        """False for what is refused as another type of part."""
        own = cls.model_fields.get("type")
        return own is None or kind is None or kind in get_args(own.annotation)

    @classmethod
    def _misplaced(cls) -> frozenset[str]:
        return cls.elsewhere - cls.model_fields.keys()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        names = "|".join(sorted(cls._misplaced()))
        nothing: JsonSchemaValue = {"enum": [None, False, 0, "", [], {}]}
        handler.resolve_ref_schema(schema)["patternProperties"] = {f"^({names})$": nothing}
        return schema


def _readable(url: str) -> str:
    if re.match(_URL, url) is None:
        raise ValueError("it has to be a data URI, an http or https address, or an absolute path")
    return url


Url = Annotated[str, AfterValidator(_readable), Field(json_schema_extra={"pattern": _URL})]


LOCAL_HOSTS = ("", "localhost")


class MediaUrl(Strict):
    """Where an image or a video is: a data URI, an address, a path, or an upload."""

    url: Url

    def media(self, kind: Kind) -> Media:
        """A path where it is one; whether it is read at all the media policy decides."""
        url = self.url
        if url[:5].lower() == "file:":
            try:
                parts = urlsplit(url)
            except ValueError:  # a bracket that does not close
                parts = None
            if parts is None or parts.netloc not in LOCAL_HOSTS or parts.query or parts.fragment:
                raise bad_request(f"the address of the {kind} is not one of this machine")
            return Media(kind, path=unquote(parts.path))
        return Media(kind, path=url) if url.startswith("/") else Media(kind, url=url)


def _as_media_url(place: Any) -> Any:
    return {"url": place} if isinstance(place, str) else place


AnyMediaUrl = Annotated[
    MediaUrl, BeforeValidator(_as_media_url, json_schema_input_type=Url | MediaUrl)
]


class Part(RejectMisplacedContent):
    """What a message consists of; a second content in it is refused."""

    elsewhere = MISPLACED_NAMES | {"text"}
    hint = "a part is a text, an image or a video; make it two parts"


class TextPart(Part):
    """A text, under the name of any route."""

    type: Literal["text", "input_text", "output_text"]
    text: str

    def to_contract(self) -> str:
        return self.text


class ImagePart(Part):
    """An image, as OpenAI's routes name it."""

    type: Literal["image_url", "input_image"]
    image_url: AnyMediaUrl

    def to_contract(self) -> Media:
        return self.image_url.media("image")


class NamedImagePart(Part):
    """An image, as mlx-vlm names it."""

    type: Literal["image"]
    image: AnyMediaUrl

    def to_contract(self) -> Media:
        return self.image.media("image")


class VideoPart(Part):
    """A video, as vLLM names it."""

    type: Literal["video_url", "input_video"]
    video_url: AnyMediaUrl

    def to_contract(self) -> Media:
        return self.video_url.media("video")


class NamedVideoPart(Part):
    """A video, as mlx-vlm names it."""

    type: Literal["video"]
    video: AnyMediaUrl

    def to_contract(self) -> Media:
        return self.video.media("video")


_Medium = ImagePart | NamedImagePart | VideoPart | NamedVideoPart
MediaPart = Annotated[_Medium, Field(discriminator="type")]
AnyPart = Annotated[TextPart | _Medium, Field(discriminator="type")]


class GroupPart(Strict):
    """Several images that share one vector."""

    type: Literal["group"]
    content: Annotated[list[MediaPart], Field(min_length=1, max_length=MAX_IMAGES_PER_GROUP)]

    def to_contract(self) -> Group:
        return Group([part.to_contract() for part in self.content])


AnyItem = Annotated[TextPart | _Medium | GroupPart, Field(discriminator="type")]


def count_parts(messages: Any) -> Any:
    """``messages`` as they came. ValueError for too many of them and their parts: looking at each
    takes a tenth of a millisecond, so they are counted before.
    """
    if is_list(messages):
        values = (value for one in messages if is_object(one) for value in one.values())
        check_count(len(messages) + sum(len(value) for value in values if is_list(value)))
    return messages


def check_count(count: int) -> None:
    """ValueError for more messages and parts than a conversation may have."""
    if count > MAX_MESSAGES_AND_PARTS:
        raise ValueError(
            f"there are {count:,} messages and parts; {MAX_MESSAGES_AND_PARTS:,} are taken"
        )


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# One mistake is reported, so the rest is not looked for: there may be hundreds of thousands.
TextContent = Annotated[
    list[TextPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
]
Content = Annotated[
    list[AnyPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[AnyPart]),
]


class ToolCall(Strict):
    """A call of an earlier answer; the model reads it as text."""

    class CalledFunction(Strict):
        """The function and its arguments, as JSON."""

        name: str
        arguments: str = ""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    @property
    def text(self) -> str:
        return call_text(self.function.name, self.function.arguments)


def call_text(name: str, arguments: str) -> str:
    """A function's call as the model reads it."""
    return f"{name}({arguments})"


def result_message(name: str | None, parts: Sequence[str | Media]) -> Message:
    """What a function returned, which the model reads as a user's message."""
    return Message("user", [f"{name or 'The function'} returned: ", *parts])


Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/_-]{16,}={0,2}$")]
EncodedImages = Annotated[list[Base64], Field(fail_fast=True)]


def encoded_image(data: str) -> Media:
    """An image that comes as base64 alone."""
    return Media("image", url=f"data:image/*;base64,{data}")


class Turn(RejectMisplacedContent):
    """A message of any role."""

    role: Any
    content: Any

    @property
    def parts(self) -> list[str | Media]:
        return [part.to_contract() for part in self.content or ()]


class SystemTurn(Turn):
    """Instructions; text alone."""

    role: Literal["system", "developer"]
    content: TextContent

    def to_contract(self) -> Message:
        return Message("system", self.parts)


class UserTurn(Turn):
    """``images`` : base64, as Ollama's clients send them beside the text."""

    role: Literal["user"]
    content: Content
    images: EncodedImages | None = None

    def to_contract(self) -> Message:
        return Message("user", [*map(encoded_image, self.images or ()), *self.parts])


class AssistantTurn(Turn):
    """An earlier answer, or the calls that it was."""

    role: Literal["assistant"]
    content: TextContent | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None

    def to_contract(self) -> Message:
        calls = "\n".join(call.text for call in self.tool_calls or ())
        return Message("assistant", [*self.parts, *([calls] if calls else [])])


class ToolTurn(Turn):
    """What a function returned. ``tool_call_id`` : of the call that it answers."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None


AnyTurn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


def called_since_asked(turns: Sequence[AnyTurn]) -> set[str]:
    """The names of the functions that were called since the user's last message."""
    names: set[str] = set()
    for turn in turns:
        if isinstance(turn, UserTurn):
            names = set()
        elif isinstance(turn, AssistantTurn):
            names |= {call.function.name for call in turn.tool_calls or ()}
    return names


def conversation(turns: Sequence[AnyTurn]) -> list[Message]:
    """The messages of a chat. What a function returned has the name that its call has."""
    names: dict[str | None, str] = {}
    messages: list[Message] = []
    for turn in turns:
        if isinstance(turn, ToolTurn):
            messages.append(result_message(names.get(turn.tool_call_id), turn.parts))
            continue
        if isinstance(turn, AssistantTurn):
            names |= {call.id: call.function.name for call in turn.tool_calls or ()}
        messages.append(turn.to_contract())
    return messages
