"""``GET /openapi.json``: every route in OpenAPI 3.1, with the schemas of the models and types."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from mlx_onevision.plugins.contract.wire import API_VERSION, Part, Record
from mlx_onevision.plugins.hosts.http.errors import ErrorBody
from mlx_onevision.plugins.hosts.http.operations import EVENTS, JSON, AppState, Operation
from mlx_onevision.plugins.hosts.http.schemas import VideoRequest

FILE_BODY_TYPES = (
    "video/*",
    "image/*",
    "application/octet-stream",
)  # types of a body that is a file

OPENAPI_VERSION = "3.1.1"

Document = dict[str, Any]


@dataclass(frozen=True, eq=False)
class WithKeys:
    """Annotates a record of the contract that is sent with further keys, each with its schema."""

    keys: Mapping[str, JsonSchemaValue]

    def __get_pydantic_json_schema__(
        self, core: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core)
        record = handler.resolve_ref_schema(schema)
        record["properties"].update(self.keys)
        record["required"] = list(dict.fromkeys((*record.get("required", ()), *self.keys)))
        return schema


class SchemaGenerator(GenerateJsonSchema):
    """Answers hold the keys that are declared, and no others."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False  # names are enough

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        return {"additionalProperties": False, **super().typed_dict_schema(schema)}

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        made = super().dataclass_schema(schema)
        cls = schema["cls"]
        if issubclass(cls, Part):
            made["additionalProperties"] = False
            if issubclass(cls, Record):  # inside another it has none
                made["properties"]["api_version"] = {"const": API_VERSION}
            if cls.discriminator is not None:
                made["properties"]["kind"] = {"const": cls.discriminator}
                made["required"] = ["kind", *made.get("required", [])]
        return made

    def bytes_schema(self, schema: core_schema.BytesSchema) -> JsonSchemaValue:
        return {"type": "string", "contentEncoding": "base64"}


# Why a request is refused, of any route; of those that take a body; of some.
_REASONS_OF_ANY = {
    400: "The request cannot be served as it stands.",
    403: "Another page sent it.",
    421: "It calls the server by a name that is not the server's.",
    500: "A fault of the server's own.",
    503: "Not now: no memory, no model, out of time, or cancelled.",
}
_REASONS_WITH_BODY = {
    408: "The body did not come.",
    413: "It is too long, or holds too much.",
    415: "The body is of another type, or compressed.",
    429: "Too much at once; try again in a moment.",
}
_REASONS_OF_SOME = {
    401: "The token is missing or wrong.",
    404: "There is no such thing.",
    507: "The disk is full.",
}
_REASONS = {**_REASONS_OF_ANY, **_REASONS_WITH_BODY, **_REASONS_OF_SOME}

_HEADERS: dict[int, Document] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}},
}


def document(operations: Sequence[Operation], state: AppState) -> Document:
    """The OpenAPI file of these operations, for the server as it is set up."""
    token = state.settings.token is not None
    schemas, components = _schemas(operations)
    paths: dict[str, Document] = {}
    used: set[int] = set()
    for one in operations:
        model = (404,) if one.takes is not None else ()  # another one
        body = _REASONS_WITH_BODY if one.takes is not None or one.takes_file else ()
        statuses = sorted(
            {*_REASONS_OF_ANY, *one.refuses, *model, *body, *((401,) if token else ())}
        )
        used.update(statuses)
        described: Document = {"operationId": one.name, "summary": one.summary}
        path = re.sub(r":\w+}", "}", one.path)
        if names := re.findall(r"{(\w+)}", path):
            example = {"example": state.model} if path.startswith("/v1/models/") else {}
            described["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                | example
                for name in names
            ]
        if one.takes is not None:
            _as_set_up(one, components[one.takes.__name__]["properties"], state)
            content = {JSON: {"schema": schemas[one.takes]}}
            described["requestBody"] = {"required": True, "content": content}
        if one.takes_file:
            described["requestBody"] = {
                "required": True,
                "content": {kind: {} for kind in FILE_BODY_TYPES},
            }
        good = {
            kind: {"schema": _event(one, schemas[shape]) if kind == EVENTS else schemas[shape]}
            for kind, shape in one.gives.items()
        }
        described["responses"] = {
            str(one.status): {"description": one.summary, "content": good},
            **{str(s): {"$ref": f"#/components/responses/{s}"} for s in statuses},
        }
        paths.setdefault(path, {})[one.method.lower()] = described
    refusal = {JSON: {"schema": schemas[ErrorBody]}}
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "mlx-onevision",
            "version": version("mlx-onevision"),
            "description": "A model that sees, as OpenAI's clients speak to one.",
        },
        "servers": [{"url": "/"}],
        **({"security": [{"token": []}]} if token else {}),
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                str(status): {"description": _REASONS[status], "content": refusal}
                | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
                for status in sorted(used)
            },
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(operations: Sequence[Operation]) -> tuple[dict[Any, Document], dict[str, Document]]:
    """The schema of each type, and the components that these refer to."""
    taken = (one.takes for one in operations if one.takes is not None)
    given = (kind for one in operations for kind in one.gives.values())
    kinds = list(dict.fromkeys((ErrorBody, *taken, *given)))
    found, shared = TypeAdapter.json_schemas(
        [(kind, "validation", TypeAdapter(kind)) for kind in kinds],
        ref_template="#/components/schemas/{model}",
        schema_generator=SchemaGenerator,
    )
    return {kind: found[kind, "validation"] for kind in kinds}, shared.get("$defs", {})


def _as_set_up(one: Operation, fields: Document, state: AppState) -> None:
    """What of a request depends on the server: the model that is served, and ``max_tokens`` of a
    described video, which is not lowered.
    """
    fields["model"] = {"enum": [state.model, None]}
    most = state.settings.max_tokens
    for kind in fields["max_tokens"]["anyOf"] if one.takes is VideoRequest and most else ():
        if kind.get("type") == "integer":
            kind["maximum"] = most


def _event(one: Operation, shape: Document) -> Document:
    data: Document = {"type": "string", "contentMediaType": JSON, "contentSchema": shape}
    if one.ends is not None:
        data = {"anyOf": [data, {"const": one.ends}]}
    return {
        "type": "object",
        "description": "One of the server-sent events.",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["data"],
    }
