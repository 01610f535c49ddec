"""What an answer's text has to be, as requests say it."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_onevision.plugins.hosts.http.content import Strict


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
