"""The form of an answer: the JSON Schema that a request holds it to."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mlx_onevision.plugins.contract.wire import is_object
from mlx_onevision.plugins.hosts.http.content import Strict
from mlx_onevision.plugins.hosts.http.errors import HTTPError


class TextFormat(Strict):
    """Plain text, as without any form."""

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
    """A JSON Schema, as chat completions have it."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    """A JSON Schema, as responses have it."""

    type: Literal["json_schema"]


ChatFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
FlatFormat = Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")]


Schema = dict[str, Any] | str


class StructuredOutputs(Strict):
    """vLLM's; of its kinds only ``json`` and ``json_object``."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"enum": [None, False]}})

    json_: Annotated[Schema | None, Field(alias="json")] = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        for name, value in values.items() if is_object(values) else ():
            if name not in ("json", "json_object") and value is not None and value is not False:
                raise ValueError(f"{name[:40]} is not supported; send json, a JSON Schema")
        return values


class Formats(Strict):
    """The form of an answer as other servers name it: ``guided_json`` and ``structured_outputs``
    are vLLM's, ``json_schema`` llama.cpp's, ``format`` Ollama's.
    """

    guided_json: Schema | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None

    @property
    def named_otherwise(self) -> list[str]:
        """The schemas that these names hold, as JSON."""
        asked = self.structured_outputs or StructuredOutputs()
        given = [self.guided_json, asked.json_, self.json_schema]
        given.append(None if isinstance(self.format, str) else self.format)
        found = [
            one if isinstance(one, str) else as_schema(one) for one in given if one is not None
        ]
        return found + [as_schema(None)] * (bool(asked.json_object) + (self.format == "json"))


def schema_text(asked: ChatFormat | FlatFormat | None, other: Formats) -> str | None:
    """The JSON Schema that the answer has to follow, as JSON; None for plain text. Raises
    HTTPError: 400, where there are several.
    """
    own = None if asked is None else _schema(asked)
    found = [*([] if own is None else [own]), *other.named_otherwise]
    if len(found) > 1:
        message = "the form of the answer is given by several names; give one of them"
        raise HTTPError(400, message)
    return found[0] if found else None


def _schema(asked: ChatFormat | FlatFormat) -> str | None:
    if isinstance(asked, TextFormat):
        return None
    if isinstance(asked, ObjectFormat):
        return as_schema(asked.schema_)
    named = asked.json_schema if isinstance(asked, SchemaFormat) else asked
    return as_schema(named.schema_, lenient=named.strict is False)


def as_schema(schema: Mapping[str, Any] | None, lenient: bool = False) -> str:
    """A schema as JSON; without one any object. ``lenient`` : without unsupported keywords."""
    schema = {"type": "object"} if schema is None else schema
    return json.dumps({**schema, "x-guidance": {"lenient": True}} if lenient else schema)
