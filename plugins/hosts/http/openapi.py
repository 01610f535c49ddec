"""``GET /openapi.json``: every route, as it declares itself, in OpenAPI 3.1. Nothing is written
twice: schemas come from the very models that requests are checked with.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pydantic import GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_onevision.plugins.contract.wire import API_VERSION, Part, Record
from mlx_onevision.plugins.hosts.http.errors import ErrorBody
from mlx_onevision.plugins.hosts.http.operations import EVENTS, JSON, Endpoint, Operation, Serving

# JSON Schemas of requests, answers and the contract's own objects, as pydantic makes them.


@dataclass(frozen=True, eq=False)
class Beside:
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


class Generator(GenerateJsonSchema):
    """Answers hold what they are said to, and nothing else."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False  # names say it

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        return {"additionalProperties": False, **super().typed_dict_schema(schema)}

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Of a part of the contract, as its ``to_dict`` writes it."""
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


OPENAPI = "3.1.1"

Document = dict[str, Any]

# Why a request is refused, of any route; of those that take a body; of some.
_ALWAYS = {
    400: "The request cannot be served as it stands.",
    403: "Another page sent it.",
    421: "It calls the server by a name that is not the server's.",
    500: "A fault of the server's own.",
    503: "Not now: no memory, no model, out of time, or cancelled.",
}
_WITH_BODY = {
    408: "The body did not come.",
    413: "It is too long, or holds too much.",
    415: "The body is not plain application/json.",
    429: "Too much at once; try again in a moment.",
}
_SOME = {
    401: "The token is missing or wrong.",
    404: "There is no such thing.",
    409: "It is in a state that does not allow it.",
}
_WHY = {**_ALWAYS, **_WITH_BODY, **_SOME}

_HEADERS: dict[int, Document] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}, "required": True}},
    429: {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "required": True}},
}


def operation(others: Sequence[Operation]) -> Operation:
    """The route that tells of all the others, and of itself."""

    def endpoint(serving: Serving) -> Endpoint:
        made: list[Response] = []

        async def answer(_: Request) -> Response:
            if not made:
                told = await serving.blocking(lambda: document([*others, own], serving))
                made.append(JSONResponse(told))
            return made[0]

        return answer

    own = Operation(
        "GET",
        "/openapi.json",
        endpoint,
        name="openapi",
        summary="This file",
        gives={JSON: dict[str, Any]},
    )
    return own


def document(operations: Sequence[Operation], serving: Serving) -> Document:
    """The whole file, for a server as it is set up."""
    token = serving.settings.token is not None
    schemas, components = _schemas(operations)
    for one in operations:
        if one.takes is not None:
            _as_set_up(components[one.takes.__name__], serving)
    paths: dict[str, Document] = {}
    for one in operations:
        statuses = sorted(_refused(one, token))
        path = re.sub(r":\w+}", "}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = {
            "operationId": one.name,
            "summary": one.summary,
            **_parameters(path, serving.model),
            **_body(one, schemas),
            "responses": {
                str(one.status): {"description": one.summary, "content": _gives(one, schemas)},
                **{str(s): {"$ref": f"#/components/responses/{s}"} for s in statuses},
            },
        }
    used = sorted({status for one in operations for status in _refused(one, token)})
    return {
        "openapi": OPENAPI,
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
            "responses": {str(status): _refusal(status, schemas) for status in used},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _schemas(operations: Sequence[Operation]) -> tuple[dict[Any, Document], dict[str, Document]]:
    """Of every type that crosses over its schema, and what these have in common by name."""
    kinds: list[Any] = [ErrorBody]
    for one in operations:
        kinds += one.gives.values()
        if one.takes is not None:
            kinds.append(one.takes)
    kinds = list(dict.fromkeys(kinds))
    found, shared = TypeAdapter.json_schemas(
        [(str(place), "validation", TypeAdapter(kind)) for place, kind in enumerate(kinds)],
        ref_template="#/components/schemas/{model}",
        schema_generator=Generator,
    )
    schemas = {kind: found[str(place), "validation"] for place, kind in enumerate(kinds)}
    return schemas, shared.get("$defs", {})


def _as_set_up(schema: Document, serving: Serving) -> None:
    """What of a request depends on the server: one model is served, and answers have an end."""
    fields = schema["properties"]
    if "model" in fields:
        fields["model"] = {"enum": [serving.model, None]}
    most = serving.settings.max_tokens
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if name in fields and most is not None:
            for kind in (fields[name], *fields[name].get("anyOf", ())):
                if kind.get("type") == "integer":
                    kind["maximum"] = most


def _refused(one: Operation, token: bool) -> set[int]:
    statuses = {*_ALWAYS, *one.refuses}
    if token:
        statuses.add(401)
    if one.takes is not None:
        statuses |= _WITH_BODY.keys()
        if "model" in one.takes.model_fields:
            statuses.add(404)
    return statuses


def _refusal(status: int, schemas: dict[Any, Document]) -> Document:
    return {
        "description": _WHY[status],
        **({"headers": _HEADERS[status]} if status in _HEADERS else {}),
        "content": {JSON: {"schema": schemas[ErrorBody]}},
    }


def _parameters(path: str, model: str) -> Document:
    names = re.findall(r"{(\w+)}", path)
    example = {"example": model} if path.startswith("/v1/models/") else {}
    made = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, **example}
        for name in names
    ]
    return {"parameters": made} if made else {}


def _body(one: Operation, schemas: dict[Any, Document]) -> Document:
    if one.takes is None:
        return {}
    return {"requestBody": {"required": True, "content": {JSON: {"schema": schemas[one.takes]}}}}


def _gives(one: Operation, schemas: dict[Any, Document]) -> Document:
    return {
        kind: {"schema": _event(one, schemas[shape]) if kind == EVENTS else schemas[shape]}
        for kind, shape in one.gives.items()
    }


def _event(one: Operation, shape: Document) -> Document:
    """One event of a stream."""
    data: Document = {
        "type": "string",
        "contentMediaType": JSON,
        "contentSchema": shape,
    }
    if one.ends is not None:
        data = {"anyOf": [data, {"const": one.ends}]}
    return {
        "type": "object",
        "description": "One of the server-sent events.",
        "properties": {"event": {"type": "string"}, "data": data},
        "required": ["data"],
    }
