"""What a message, and whatever else is looked at, consists of, as requests have it.

A picture has the names that it has in any of OpenAI's routes, in vLLM and in mlx-vlm; each of them
is taken in all routes.
"""

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
