"""Reading of JSON fields by type and range: an invalid value is an error that names its field, and
so is a model of another kind; an unknown key is logged by name.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeGuard

from mlx_onevision.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger("mlx_onevision")

Json = Mapping[str, Any]

ACTIVATIONS = frozenset(
    """
    gelu gelu_python gelu_pytorch_tanh gelu_python_tanh gelu_new gelu_accurate gelu_fast quick_gelu
    silu swish relu relu2 relu6 mish sigmoid tanh linear
    """.split()
)

# Read by the reference, without effect on what it computes at inference.
INERT = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    decoder_start_token_id eos_token_id id2label ignore_index initializer_factor initializer_range
    is_decoder is_encoder_decoder label2id max_window_layers model_type name_or_path _name_or_path
    output_attentions output_hidden_states pad_token_id problem_type projection_size return_dict
    rope_scaling rope_theta sliding_window tie_encoder_decoder torchscript transformers_version
    use_bfloat16 use_cache use_image_newline_parameter use_sliding_window vision_use_head
    _attn_implementation_autoset _attn_implementation attn_implementation
    """.split()
)
# Generation settings that old releases wrote into every configuration; those in force stand in
# generation_config.json.
INERT_GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix
    pruned_heads remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p
    typical_p cross_attention_hidden_size add_cross_attention
    """.split()
)


def shown(value: Any) -> str:
    """A value as errors show it: on one line, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:70]}…{text[-40:]}"


def is_object(value: object) -> TypeGuard[Json]:
    """Whether it is a JSON object."""
    return isinstance(value, Mapping)


def is_array(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a JSON array."""
    return isinstance(value, list | tuple)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold, neither infinite nor NaN."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


class Reader:
    """Reads one JSON object; ``where`` names it in errors. A null counts as absent."""

    def __init__(self, values: Json, where: str) -> None:
        self.values = values
        self.where = where

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    # Each raises ConfigError, naming the field, for a value that it does not return.

    def integer(self, key: str, default: int, most: int, least: int = 1) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise ConfigError(
                f"{self.where}: {key} is {shown(value)}, not a whole number from {least} to {most}"
            )
        return value

    def square(self, key: str, default: int, most: int) -> int:
        """The side of a square: a whole number, or two equal ones."""
        value = self.values.get(key)
        if is_array(value) and len(value) == 2 and value[0] == value[1]:
            return Reader({key: value[0]}, self.where).integer(key, default, most)
        return self.integer(key, default, most)

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, not a number")
        if not is_number(value) or value <= 0:
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, not a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, not true or false")
        return value

    def choice(self, key: str, default: str, choices: frozenset[str]) -> str:
        """One of ``choices``."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(
                f"{self.where}: {key} is {shown(value)}; supported are {', '.join(sorted(choices))}"
            )
        return value


def require_type(values: Json, where: str, expected: str) -> None:
    """Raises ConfigError where an object's ``model_type`` is another one."""
    found = values.get("model_type", expected)
    if found != expected:
        raise ConfigError(f"{where} has model_type {shown(found)}; only {expected!r} is supported")


def report_unknown(
    values: Json,
    cls: type[DataclassInstance],
    where: str,
    more: Sequence[str] = (),
    less: Sequence[str] = (),
) -> None:
    """Logs the keys that are no fields of ``cls`` and not ``more``, or are among ``less``."""
    known = {field.name for field in fields(cls)} | INERT | INERT_GENERATION | set(more)
    unknown = sorted(set(values) - known | set(values) & set(less))
    if unknown:
        logger.warning(
            "%s has keys that LLaVA-OneVision does not define (no effect, as in the reference): %s",
            where,
            ", ".join(unknown),
        )
