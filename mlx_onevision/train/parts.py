# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
"""What of a model is trained: low-rank terms by mlx-lm's layers, or the weights themselves, and the
adapter that they are written as.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_onevision.checkpoint.adapters import CONFIG, MLX_WEIGHTS
from mlx_onevision.checkpoint.tensors import written_name
from mlx_onevision.errors import RequestError
from mlx_onevision.files import replacing, save
from mlx_onevision.network.layers import arrays_of, dense_weight, fuse, modules_of
from mlx_onevision.network.onevision import OneVision

Method = Literal["lora", "dora", "full"]
Part = Literal["language", "projector", "tower"]
PARTS: Sequence[Part] = ("language", "projector", "tower")

MODULES: Mapping[Part, tuple[str, ...]] = {
    "language": ("language_model", "lm_head"),
    "projector": ("multi_modal_projector",),
    "tower": ("vision_tower",),
}


@dataclass(frozen=True)
class Trained:
    """What is trained, and how.

    method : low-rank terms (``lora``, ``dora``), or the weights themselves (``full``).
    parts : of the model.
    rank, scale : of the low-rank terms, ``scale * a @ b``.
    dropout : the share of a low-rank term's inputs that is left out of each batch.
    layers : of the language model that are trained, counted from the last; None: all.
    """

    method: Method = "lora"
    parts: Sequence[Part] = ("language",)
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    layers: int | None = None


class DenseLinear(nn.QuantizedLinear):
    """A quantized layer that is dequantized for each product: of the many rows of a training step
    that is faster, and which way is taken must not depend on a measurement.
    """

    def __call__(self, x: mx.array) -> mx.array:
        weight = dense_weight(self).astype(x.dtype).T
        return mx.addmm(self.bias, x, weight) if "bias" in self else x @ weight


def set_up(model: OneVision, trained: Trained, seed: int) -> None:
    """Freezes a model, whose matrices are not joined, but for what is trained.

    Raises:
        RequestError: for training quantized weights themselves, and for more layers than it has.
    """
    model.freeze()
    mx.random.seed(seed)
    count = len(model.language_model.layers)
    layers = count if trained.layers is None else trained.layers
    if layers > count:
        raise RequestError(f"the model has {count} layers, not {layers}; train as many at most")
    if trained.method == "full":
        _unfreeze(model, trained, layers)
        return
    from mlx_lm.tuner import utils

    settings = _lora_parameters(model, trained)
    in_language = layers if "language" in trained.parts else 0
    utils.linear_to_lora_layers(model, in_language, settings, use_dora=trained.method == "dora")
    fuse(model)  # what stays frozen
    for module in modules_of(model).values():
        if isinstance(module, nn.QuantizedLinear):
            module.__class__ = DenseLinear


def _unfreeze(model: OneVision, trained: Trained, layers: int) -> None:
    for name in (name for part in trained.parts for name in MODULES[part] if name in model):
        module = cast(nn.Module, model[name])
        if any("scales" in child for child in modules_of(module).values()):
            raise RequestError(
                f"{name} is quantized, and quantized weights are not trained themselves; use "
                "--method lora, or a model that is not quantized"
            )
        module.unfreeze()
    if "language" in trained.parts and layers < len(model.language_model.layers):
        model.language_model.freeze()
        for layer in model.language_model.layers[-layers:]:
            layer.unfreeze()
    if "projector" in trained.parts and "image_newline" in model:
        model.unfreeze(recurse=False, keys=["image_newline"])


def _lora_parameters(model: OneVision, trained: Trained) -> dict[str, Any]:
    """mlx-lm's settings: which layers, by name within a layer of the language model, or whole."""
    keys: list[str] = []
    for name, module in modules_of(model).items():
        if not isinstance(module, nn.Linear | nn.QuantizedLinear):
            continue
        part = next((p for p in PARTS if name.startswith(MODULES[p])), None)
        if part not in trained.parts or name == "lm_head":
            continue
        inner = name.split(".", 3)
        keys.append(inner[3] if part == "language" else name)
        # mlx-lm's DoRA computes a quantized matrix's width as columns * (32 // bits), which is too
        # small unless bits divides 32.
        bits = getattr(module, "bits", 4)
        if trained.method == "dora" and 32 % bits:
            raise RequestError(f"{name} is quantized to {bits} bits; use --method lora")
    return {
        "rank": trained.rank,
        "scale": trained.scale,
        "dropout": trained.dropout,
        "keys": sorted(set(keys)),
    }


def write_adapter(
    folder: Path, model: OneVision, trained: Trained, about: Mapping[str, Any]
) -> None:
    """Writes what is trained in mlx-lm's form, each file whole or not at all.

    about : what else to keep in the configuration.
    """
    layers = len(model.language_model.layers)
    config: dict[str, Any] = {"fine_tune_type": trained.method, "num_layers": layers}
    if trained.method != "full":
        names = ("rank", "scale", "dropout")
        config["lora_parameters"] = {name: getattr(trained, name) for name in names}
    save(folder / CONFIG, json.dumps({**config, **about}, indent=2) + "\n")
    trainable = arrays_of(model.trainable_parameters())
    arrays = {written_name(name): array for name, array in trainable.items()}
    write_arrays(folder / MLX_WEIGHTS, arrays, {"format": "mlx"})


def write_arrays(
    path: Path, arrays: Mapping[str, mx.array], about: Mapping[str, str], private: bool = False
) -> None:
    """Writes a file, or leaves the one that was there as it is. OSError where it cannot be.

    private : whether only its owner may read it.
    """
    with replacing(path, private) as file:
        mx.save_safetensors(file, dict(arrays), dict(about))
