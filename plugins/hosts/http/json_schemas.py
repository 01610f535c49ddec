"""JSON Schemas of requests, answers and the contract's own objects, as pydantic makes them."""

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from mlx_onevision.plugins.wire import API_VERSION, Part, Record


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
