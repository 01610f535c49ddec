"""What a message, and whatever else is looked at, consists of, as requests have it.

A picture has the names that it has in any of OpenAI's routes, in vLLM and in mlx-vlm; each of them
is taken in all routes.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

GROUPED = 256  # pictures in a group, at most

# What is read at all; which addresses and paths are allowed is for the policy to say.
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
    """Where a picture or a video is: a data URI, an address, or a path."""

    url: Url


def _as_place(place: Any) -> Any:
    return {"url": place} if isinstance(place, str) else place


Where = Annotated[Place, BeforeValidator(_as_place, json_schema_input_type=Url | Place)]


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url", "input_image"]
    image_url: Where


class NamedImagePart(Strict):
    type: Literal["image"]
    image: Where


class VideoPart(Strict):
    type: Literal["video_url", "input_video"]
    video_url: Where


class NamedVideoPart(Strict):
    type: Literal["video"]
    video: Where


ShownPart = Annotated[
    ImagePart | NamedImagePart | VideoPart | NamedVideoPart, Field(discriminator="type")
]
AnyPart = Annotated[
    TextPart | ImagePart | NamedImagePart | VideoPart | NamedVideoPart, Field(discriminator="type")
]


class GroupPart(Strict):
    """Several pictures that share one vector."""

    type: Literal["group"]
    content: Annotated[list[ShownPart], Field(min_length=1, max_length=GROUPED)]


AnyItem = Annotated[
    TextPart | ImagePart | NamedImagePart | VideoPart | NamedVideoPart | GroupPart,
    Field(discriminator="type"),
]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# One mistake is told, so the rest is not looked for: there may be hundreds of thousands.
Words = Annotated[
    list[TextPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
]
Parts = Annotated[
    list[AnyPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[AnyPart]),
]


class SystemTurn(Strict):
    role: Literal["system", "developer"]
    content: Words


class UserTurn(Strict):
    role: Literal["user"]
    content: Parts


class AssistantTurn(Strict):
    role: Literal["assistant"]
    content: Words


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn, Field(discriminator="role")]


# What an answer's text has to be, as requests say it.


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema and its name. The answer follows it, whatever ``strict`` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Strict):
    """As chat completions have it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """As responses have it."""

    type: Literal["json_schema"]


ChatFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
FlatFormat = Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")]


def schema_text(asked: ChatFormat | FlatFormat | None) -> str | None:
    """The JSON Schema that the answer has to follow, as JSON; None for plain text."""
    if asked is None or isinstance(asked, TextFormat):
        return None
    if isinstance(asked, ObjectFormat):
        schema = None
    else:
        schema = (asked.json_schema if isinstance(asked, SchemaFormat) else asked).schema_
    return json.dumps({"type": "object"} if schema is None else schema)
