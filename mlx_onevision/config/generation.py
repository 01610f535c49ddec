"""A checkpoint's defaults for sampling: generation_config.json."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_onevision.config.json_fields import Json, Reader, is_array, is_object, shown
from mlx_onevision.errors import ConfigError

logger = logging.getLogger("mlx_onevision")

# Settings that would change an answer in the reference and that are not supported here, each with
# the value that switches it off (beside null).
UNSUPPORTED: Mapping[str, Any] = {
    "num_beams": 1,
    "penalty_alpha": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "dola_layers": None,
    "watermarking_config": None,
}


@dataclass(frozen=True)
class GenerationDefaults:
    """The checkpoint's defaults for sampling; a request's settings come first.

    eos_token_ids : the ids that end an answer; empty where no file names any.
    do_sample : False is greedy, whatever the four numbers say.
    top_k : 0 for all tokens. A file that samples without a ``top_k`` gets the reference's 50.
    max_new_tokens : None where the file has no limit of its own.
    """

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None

    @classmethod
    def from_dict(cls, values: Json | None, config: Json) -> "GenerationDefaults":
        """From generation_config.json (None: there is none) and the whole config.json.

        As in the reference, config.json's ``eos_token_id`` counts only where the former file is
        absent.

        Raises:
            ConfigError: naming a field that is not a number in its range.
        """
        if values is None:
            eos, text = config.get("eos_token_id"), config.get("text_config")
            if eos is None and is_object(text):
                eos = text.get("eos_token_id")
            return cls(_ids(eos, "config.json"))
        where = "generation_config.json"
        for key, off in UNSUPPORTED.items():
            if values.get(key) not in (None, off):
                logger.warning("%s asks for %s, which is not done here.", where, key)
        read = Reader(values, where)
        limit = values.get("max_new_tokens")
        return cls(
            eos_token_ids=_ids(values.get("eos_token_id"), where),
            do_sample=read.flag("do_sample", cls.do_sample),
            temperature=_number(read, "temperature", cls.temperature, 1e6),
            top_p=_number(read, "top_p", cls.top_p, 1.0),
            top_k=read.integer("top_k", cls.top_k, 2_000_000, least=0),
            min_p=_number(read, "min_p", cls.min_p, 1.0),
            repetition_penalty=read.positive("repetition_penalty", cls.repetition_penalty),
            max_new_tokens=None if limit is None else read.integer("max_new_tokens", 1, 2**31 - 1),
        )


def _number(read: Reader, key: str, default: float, most: float) -> float:
    """A number from 0 to ``most``; those of :meth:`Reader.positive` are above 0."""
    if read.values.get(key) == 0:
        return 0.0
    value = read.positive(key, default) if read.values.get(key) is not None else default
    if value > most:
        raise ConfigError(f"{read.where}: {key} is {shown(value)}, which is more than {most:g}")
    return value


def _ids(given: Any, where: str) -> tuple[int, ...]:
    """A token id or a list of them, each once."""
    ids = [] if given is None else given if is_array(given) else [given]
    if not all(type(n) is int and 0 <= n < 2**31 for n in ids):
        raise ConfigError(
            f"{where}: eos_token_id is {shown(given)}, not a token id or a list of them"
        )
    return tuple(dict.fromkeys(ids))
