"""Adapters: what fine-tuning has changed of a model, as mlx-lm and PEFT write it.

An adapter is a folder with ``adapter_config.json`` and one weight file: low-rank terms (LoRA,
arXiv 2106.09685, and DoRA, arXiv 2402.09353) that are added to matrices, and whole tensors that
take the place of the model's. Names follow any layout that checkpoints have. Only the file's header
is read here; see :mod:`~mlx_onevision.checkpoint.apply_adapter` for the rest.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from mlx_onevision.checkpoint.hub import check_files
from mlx_onevision.checkpoint.plan import FLOATS
from mlx_onevision.checkpoint.tensors import ADAPTERS, Tensor, canonical_name, read_header
from mlx_onevision.config.json_fields import Json, is_number, shown
from mlx_onevision.errors import CheckpointError, short
from mlx_onevision.files import read_json

CONFIG = "adapter_config.json"
PEFT_WEIGHTS, MLX_WEIGHTS = ADAPTERS
PEFT_PREFIX = "base_model.model."

# Fields of LowRank by how the names of PEFT's and mlx-lm's tensors end. PEFT stores the transposes
# of mlx-lm's matrices.
PEFT_PARTS: Mapping[str, str] = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
MLX_PARTS: Mapping[str, str] = {"lora_a": "a", "lora_b": "b", "m": "m"}
FINE_TUNE_TYPES = ("lora", "dora", "full")

# Settings of PEFT that change what is computed in ways that are not supported.
UNSUPPORTED = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
)
# What a module's pattern may have: what can match in several ways, but for the digits of a layer's
# number, and a group only once.
DIGITS, FREE = re.compile(r"\\d[+*?]"), re.compile(r"[*+?({]")
REPEATED_GROUP = re.compile(r"\)[*+{]")
MOST_FREE = 3
# Initialisations by which PEFT takes the terms out of the base model's weights and changes these.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LowRank:
    """The low-rank term of a module, ``scale * a @ b``.

    a : (inputs, rank), or (rank, inputs) where the file has it ``transposed``.
    b : (rank, outputs), or (outputs, rank).
    m : DoRA's magnitudes, the lengths of the rows of the changed matrix, (outputs,); None for LoRA.
    summed : ``a`` holds a part of the inputs, and other ranks have the other parts.
    """

    a: Tensor
    b: Tensor
    m: Tensor | None
    scale: float
    transposed: bool
    summed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        first = 1 if self.transposed else 0
        return self.a.shape[first], self.b.shape[1 - first]

    @property
    def rank(self) -> int:
        return self.a.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, not yet read.

    low_rank : low-rank terms by the canonical names of their modules.
    whole : tensors that take the place of the model's, by canonical name.
    ties : where the embedding is the head too, what changes it changes both, as in mlx-lm; in PEFT
        it changes one of them.
    """

    folder: Path
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, Tensor]
    ties: bool

    @property
    def nbytes(self) -> int:
        """Bytes that the low-rank terms add to a model's weights; they are kept in float32."""
        added = [t for term in self.low_rank.values() for t in (term.a, term.b, term.m) if t]
        return sum(4 * math.prod(tensor.shape) for tensor in added)


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter's files, be it beside those of a model."""
    return any((folder / name).is_file() for name in (CONFIG, *ADAPTERS))


def about(folder: Path) -> dict[str, str | int | float]:
    """An adapter's name and those of its settings that are numbers or words.

    Raises:
        CheckpointError: for a configuration that is not JSON.
    """
    values = read_json(folder / CONFIG) or {}
    given: dict[str, Any] = {**values, **_object(values, "lora_parameters")}
    plain = {key: v for key, v in given.items() if isinstance(v, str | int | float)}
    return {"adapter": folder.resolve().name, **plain}


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder, from its configuration and the header of its weight file.

    Raises:
        CheckpointError: if something in it is missing, damaged or not supported.
    """
    check_files(folder)
    values = read_json(folder / CONFIG)
    if values is None:
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is not an adapter's folder")
    peft = "peft_type" in values
    file = folder / (PEFT_WEIGHTS if peft else MLX_WEIGHTS)
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {file.name}; download it again, or save the adapter as safetensors"
        )
    if (folder / "non_lora_trainables.bin").is_file():
        raise CheckpointError(
            f"{folder} keeps a part of what was trained in non_lora_trainables.bin, a pickle, "
            "which is never opened; save those tensors into the safetensors file with PEFT's "
            "modules_to_save"
        )
    (_check_peft if peft else _check_mlx)(values)
    terms, whole = _sorted_tensors(file, PEFT_PARTS if peft else MLX_PARTS)
    low_rank: dict[str, LowRank] = {}
    dora = bool(values.get("use_dora")) or values.get("fine_tune_type") == "dora"
    for path, found in terms.items():
        _check_term(path, found, dora, file)
        name = canonical_name(path)
        if name is None or canonical_name(f"{path}.weight") is None:
            continue  # of what is never computed, such as SigLIP's pooling head
        scale = _peft_scale(path, values) if peft else _mlx_scale(values)
        low_rank[name] = LowRank(found["a"], found["b"], found.get("m"), scale, peft)
    if not low_rank and not whole:
        raise CheckpointError(f"{file} holds nothing that the model computes with")
    return Adapter(folder, low_rank, whole, ties=not peft)


def _sorted_tensors(
    file: Path, parts: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The parts of each low-rank term, by the file's name for its module, and the whole tensors by
    canonical name.
    """
    terms: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for source, tensor in read_header(file).items():
        if tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{short(source)} in {file.name} is {tensor.dtype}; "
                f"it must be {' or '.join(FLOATS)}"
            )
        plain = source.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
        ending = next((end for end in parts if plain.endswith(f".{end}")), None)
        if ending is not None:
            terms.setdefault(plain.removesuffix(f".{ending}"), {})[parts[ending]] = tensor
        elif (name := canonical_name(plain)) is not None:
            whole[name] = tensor
    return terms, whole


def _check_peft(values: Json) -> None:
    if values["peft_type"] != "LORA":
        raise CheckpointError(
            f"{CONFIG}: peft_type is {values['peft_type']!r}; supported is 'LORA', with DoRA"
        )
    for key in UNSUPPORTED:
        if values.get(key):
            raise CheckpointError(f"{CONFIG}: {key} is not supported; train the adapter without it")
    initial = values.get("init_lora_weights")
    if isinstance(initial, str) and initial.startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{CONFIG}: init_lora_weights {initial!r} changes the base model; save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )


def _check_mlx(values: Json) -> None:
    kind = values.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise CheckpointError(
            f"{CONFIG}: fine_tune_type is {kind!r}; supported are {', '.join(FINE_TUNE_TYPES)}"
        )
    if kind != "full" and not isinstance(values.get("lora_parameters"), Mapping):
        raise CheckpointError(
            f"{CONFIG} has neither lora_parameters, as mlx-lm's adapters, nor a peft_type; "
            "it is of another program"
        )


def _check_term(path: str, found: Mapping[str, Tensor], dora: bool, file: Path) -> None:
    """A matrix has both its factors, and with DoRA its lengths."""
    lacking = [part for part in ("a", "b", *("m" if dora else "")) if part not in found]
    if lacking:
        some = next(iter(found.values()))
        raise CheckpointError(
            f"{file.name} has {short(some.source)}, and of {short(path)} no "
            f"{'magnitude' if lacking == ['m'] else f'lora_{lacking[0].upper()}'}"
        )
    if any(len(found[part].shape) != 2 for part in "ab"):
        raise CheckpointError(
            f"{short(found['a'].source)} is no matrix; only linear layers and the embedding take "
            "adapters"
        )


def _number(values: Json, key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not is_number(value):
        raise CheckpointError(f"{CONFIG}: {key} must be a number, not {shown(value)}")
    return float(value)


def _object(values: Json, key: str) -> Json:
    """The object under ``key``, empty where there is none."""
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{CONFIG}: {key} must be an object, not {shown(value)}")
    return cast(Json, value or {})


def _mlx_scale(values: Json) -> float:
    return _number(_object(values, "lora_parameters"), "scale")


def _peft_scale(path: str, values: Json) -> float:
    """The scale of a module's term: alpha / rank, or with rsLoRA (arXiv 2312.03732) alpha /
    sqrt(rank). ``path`` : PEFT's name for the module.
    """

    def number(patterns: Json, default: str) -> float:
        """The number of the first pattern that the module's name ends with, as PEFT has it."""
        for key in patterns:
            if _compiled(key).match(path):
                return _number(patterns, key)
        return _number(values, default)

    rank = number(_object(values, "rank_pattern"), "r")
    alpha = number(_object(values, "alpha_pattern"), "lora_alpha")
    if rank < 1:
        raise CheckpointError(
            f"{CONFIG}: the rank of {short(path)} is {rank:g}; it must be 1 or more"
        )
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


@lru_cache(maxsize=1024)
def _compiled(key: str) -> re.Pattern[str]:
    """A key of ``rank_pattern`` or ``alpha_pattern``.

    Raises:
        CheckpointError: for one that is no regular expression, or that could be tried in so many
            ways that it would not end: an adapter may be a stranger's.
    """
    free = len(FREE.findall(DIGITS.sub("", key).replace("(?:", "(")))
    if free > MOST_FREE or REPEATED_GROUP.search(key):
        raise CheckpointError(
            f"{CONFIG}: the pattern {short(key)} could take too long; "
            f"write it with at most {MOST_FREE} of * + ? ( {{ and repeat no group"
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError):
        raise CheckpointError(f"{CONFIG}: {short(key)} is no regular expression") from None
