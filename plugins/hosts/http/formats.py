"""The form of an answer: the JSON Schema that a request holds it to."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mlx_onevision.plugins.hosts.http.content import Strict


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object; or one of a schema, as llama.cpp's server takes it."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class NamedSchema(Strict):
    """A JSON Schema and its name. The answer follows it; where ``strict`` is false, keywords that
    are not supported are left out, which else refuse the request.
    """

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
    if isinstance(asked, ObjectFormat):
        return as_schema(asked.schema_)
    named = asked.json_schema if isinstance(asked, SchemaFormat) else asked
    return as_schema(named.schema_, lenient=named.strict is False)


def as_schema(schema: Mapping[str, Any] | None, lenient: bool = False) -> str:
    """lenient : leave out keywords that are not supported."""
    schema = {"type": "object"} if schema is None else schema
    return json.dumps({**schema, "x-guidance": {"lenient": True}} if lenient else schema)
