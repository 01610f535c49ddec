"""Fields that several routes have, strictly typed, and how fields are refused."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from mlx_onevision.plugins.contract.requests import LONGEST_TIMEOUT, MOST_LOGPROBS, Order, Tiling
from mlx_onevision.plugins.hosts.http.content import Strict

AtLeastOne = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Second = Annotated[float, Field(ge=0)]
Timeout = Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT)]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


class Sampling(Strict):
    """How tokens are chosen; what is left out is the checkpoint's own."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None


class Looking(Sampling):
    """Which frames of a video are looked at, and how pictures are; this server's own."""

    num_frames: AtLeastOne | None = None
    fps: Seconds | None = None
    start: Second | None = None
    end: Seconds | None = None
    tiling: Tiling = "auto"
    order: Order = "template"
    timeout: Timeout | None = None


Neutral = dict[str, tuple[Any, ...]]


class Refusing(Strict):
    """Fields that change what an answer is, and the values with which they do not."""

    neutral: ClassVar[Neutral] = {}
    ways_out: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        for name, allowed in cls.neutral.items() if isinstance(values, dict) else ():
            value = values.get(name)
            if value is not None and not any(_same(value, one) for one in allowed):
                raise ValueError(cls.ways_out.get(name, f"{name} is not supported; leave it out"))
        return values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for name, allowed in cls.neutral.items():
            properties[name] = {"enum": [None, *allowed], "description": "Not supported."}
        return schema


def _same(value: Any, allowed: Any) -> bool:
    """As JSON compares them: false is not 0."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed
