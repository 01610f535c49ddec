"""JSON Schemas of requests, answers and the contract's own objects, as pydantic makes them."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from mlx_onevision.plugins.contract.wire import API_VERSION, Part, Record


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
