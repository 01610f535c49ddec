"""Messages, their parts and the format of an answer: what requests hold, made the contract's.
All routes take the names of parts of any of OpenAI's routes, of vLLM and of mlx-vlm.
"""

import json
import re
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mlx_onevision.plugins.contract.errors import bad_request
from mlx_onevision.plugins.contract.requests import Group, Kind, Media, Message, Role

GROUPED = 256  # images in a group, at most

# What is taken at all; which addresses and paths are allowed the media policy decides.
_URL = r"^([dD][aA][tT][aA]:|[hH][tT][tT][pP][sS]?://|[fF][iI][lL][eE]:/|/)"


class Strict(BaseModel):
    """No "1" for 1, no infinity, nothing dropped in silence but unknown fields."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


def _readable(url: str) -> str:
    if re.match(_URL, url) is None:
        raise ValueError("it has to be a data URI, an http or https address, or an absolute path")
    return url


Url = Annotated[str, AfterValidator(_readable), Field(json_schema_extra={"pattern": _URL})]


class Place(Strict):
    """Where an image or a video is: a data URI, an address, or a path."""

    url: Url

    def media(self, kind: Kind) -> Media:
        """A path where it is one; whether it is read at all the media policy decides."""
        url = self.url
        if url[:5].lower() == "file:":
            parts = urlsplit(url)
            if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
                raise bad_request(f"the address of the {kind} is not one of this machine")
            return Media(kind, path=unquote(parts.path))
        return Media(kind, path=url) if url.startswith("/") else Media(kind, url=url)


def _as_place(place: Any) -> Any:
    return {"url": place} if isinstance(place, str) else place


Where = Annotated[Place, BeforeValidator(_as_place, json_schema_input_type=Url | Place)]


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str

    def to_contract(self) -> str:
        return self.text


class ImagePart(Strict):
    type: Literal["image_url", "input_image"]
    image_url: Where

    def to_contract(self) -> Media:
        return self.image_url.media("image")


class NamedImagePart(Strict):
    type: Literal["image"]
    image: Where

    def to_contract(self) -> Media:
        return self.image.media("image")


class VideoPart(Strict):
    type: Literal["video_url", "input_video"]
    video_url: Where

    def to_contract(self) -> Media:
        return self.video_url.media("video")


class NamedVideoPart(Strict):
    type: Literal["video"]
    video: Where

    def to_contract(self) -> Media:
        return self.video.media("video")


_Medium = ImagePart | NamedImagePart | VideoPart | NamedVideoPart
MediaPart = Annotated[_Medium, Field(discriminator="type")]
AnyPart = Annotated[TextPart | _Medium, Field(discriminator="type")]


class GroupPart(Strict):
    """Several images that share one vector."""

    type: Literal["group"]
    content: Annotated[list[MediaPart], Field(min_length=1, max_length=GROUPED)]

    def to_contract(self) -> Group:
        return Group([part.to_contract() for part in self.content])


AnyItem = Annotated[TextPart | _Medium | GroupPart, Field(discriminator="type")]


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


class Turn(Strict):
    role: Any
    content: Any

    def to_contract(self) -> Message:
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, [part.to_contract() for part in self.content])


class SystemTurn(Turn):
    role: Literal["system", "developer"]
    content: TextContent


class UserTurn(Turn):
    role: Literal["user"]
    content: Content


class AssistantTurn(Turn):
    role: Literal["assistant"]
    content: TextContent


AnyTurn = Annotated[SystemTurn | UserTurn | AssistantTurn, Field(discriminator="role")]


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema and its name. The answer follows it, whatever ``strict`` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


ChatFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
FlatFormat = Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")]


def schema_text(asked: ChatFormat | FlatFormat | None) -> str | None:
    """The JSON Schema that the answer has to follow, as JSON; None for plain text."""
    if asked is None or isinstance(asked, TextFormat):
        return None
    named = asked.json_schema if isinstance(asked, SchemaFormat) else asked
    schema = None if isinstance(named, ObjectFormat) else named.schema_
    return json.dumps({"type": "object"} if schema is None else schema)
