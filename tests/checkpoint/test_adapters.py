"""Adapters: the model that they make is the one whose matrices were changed by hand."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import features, logits
from checkpoints import Sizes, arrays, layout_name, write, write_weights

from mlx_onevision.api import load
from mlx_onevision.checkpoint.hub import identify, resolve_adapter
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import while_loading
from mlx_onevision.errors import CheckpointError, ModelNotFoundError, OneVisionError
from mlx_onevision.network.layers import AdaptedLinear, LongStepLinear

RANK, SCALE = 3, 2.0
MODULES = (
    "language_model.layers.0.self_attn.q_proj",
    "language_model.layers.1.mlp.down_proj",
    "multi_modal_projector.linear_1",
    "vision_tower.encoder.layers.0.mlp.fc1",
)


def factors(modules: tuple[str, ...] = MODULES) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """PEFT's A (rank, inputs) and B (outputs, rank) of each module."""
    rng = np.random.default_rng(1)
    weights = arrays()
    made = {}
    for module in modules:
        outputs, inputs = weights[f"{module}.weight"].shape
        a, b = rng.standard_normal((RANK, inputs)), rng.standard_normal((outputs, RANK))
        made[module] = (0.1 * a.astype(np.float32), 0.2 * b.astype(np.float32))
    return made


def lengths(weight: np.ndarray, seed: int = 2) -> np.ndarray:
    spread = np.random.default_rng(seed).uniform(0.8, 1.2, len(weight))
    return (np.linalg.norm(weight, axis=1) * spread).astype(np.float32)


def changed(dora: bool = False) -> dict[str, np.ndarray]:
    """The weights with the adapter in them, computed by numpy."""
    weights = arrays()
    for module, (a, b) in factors().items():
        before = weights[f"{module}.weight"]
        weight = before + SCALE * b @ a
        if dora:
            weight *= (lengths(before) / np.linalg.norm(weight, axis=1))[:, None]
        weights[f"{module}.weight"] = weight
    return weights


def peft(folder: Path, layout: str = "hub", dora: bool = False, **settings: Any) -> Path:
    tensors = {}
    for module, (a, b) in factors().items():
        name = "base_model.model." + layout_name(module, layout)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = lengths(arrays()[f"{module}.weight"])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK, "use_dora": dora}
    return adapter(folder, "adapter_model", config | settings, tensors)


def mlx_lm(folder: Path, dora: bool = False, **settings: Any) -> Path:
    tensors = {}
    for module, (a, b) in factors().items():
        name = layout_name(module, "mlx-vlm")
        tensors |= {f"{name}.lora_a": a.T, f"{name}.lora_b": b.T}
        if dora:
            tensors[f"{name}.m"] = lengths(arrays()[f"{module}.weight"])
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
    }
    return adapter(folder, "adapters", config | settings, tensors)


def adapter(
    folder: Path, file: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "own").mkdir()
    write_weights(folder / "own", {name: np.ascontiguousarray(t) for name, t in tensors.items()})
    (folder / "own/model.safetensors").rename(folder / f"{file}.safetensors")
    return folder


def refusal(model: Path, given: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, adapter=given)
    return str(caught.value)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("form", ["hub", "transformers-4.52", "transformers-5", "lmms-lab", "mlx"])
def test_every_form_is_the_model_with_changed_matrices(
    tmp_path: Path, form: str, dora: bool
) -> None:
    base = write(tmp_path / "base", tied=False)
    weights = changed(dora) | {"lm_head.weight": arrays(tied=False)["lm_head.weight"]}
    wanted = load_checkpoint(write(tmp_path / "changed", tied=False, weights=weights)).model
    given = mlx_lm(tmp_path / "a", dora) if form == "mlx" else peft(tmp_path / "a", form, dora)
    model = load_checkpoint(base, adapter=given).model
    assert np.abs(logits(model) - logits(wanted)).max() < 2e-5  # of logits of about 3
    assert np.abs(features(model) - features(wanted)).max() < 2e-5
    assert np.abs(logits(model) - logits(load_checkpoint(base).model)).max() > 0.1


def test_only_the_matrices_of_the_adapter_stay_apart(tmp_path: Path) -> None:
    model = load_checkpoint(write(tmp_path / "m"), adapter=peft(tmp_path / "a")).model
    first, second = model.language_model.layers
    assert "qkv_proj" not in first.self_attn and "gate_up_proj" in first.mlp
    assert "qkv_proj" in second.self_attn
    assert type(first.self_attn.q_proj) is AdaptedLinear


def test_on_a_quantized_model(tmp_path: Path) -> None:
    """The low-rank terms are added to the products of the quantized matrices."""
    base = write(tmp_path / "base")
    plain = load_checkpoint(base, recipe=while_loading(8), fused=False).model
    adapted = load_checkpoint(base, recipe=while_loading(8), adapter=peft(tmp_path / "a")).model
    layer = adapted.language_model.layers[0].self_attn.q_proj
    assert type(layer.linear) is LongStepLinear
    x = mx.random.normal((2, 64), key=mx.random.key(0))
    a, b = factors()[MODULES[0]]
    wanted = plain.language_model.layers[0].self_attn.q_proj(x) + SCALE * x @ mx.array(a.T @ b.T)
    assert np.abs(np.array(layer(x) - wanted)).max() < 1e-4


def test_an_adapter_fits_a_tower_that_was_padded_to_be_quantized(tmp_path: Path) -> None:
    name = "base_model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    ones = {f"{name}.lora_A.weight": np.ones((1, 64)), f"{name}.lora_B.weight": np.ones((96, 1))}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    given = adapter(tmp_path / "a", "adapter_model", config, ones)
    base = write(tmp_path / "m", sizes=Sizes(vision_intermediate=96))
    model = load_checkpoint(base, recipe=while_loading(4), adapter=given).model
    term = np.array(model.vision_tower.encoder.layers[0].mlp.fc1["lora_b"])
    assert term.tolist() == [[1.0] * 96 + [0.0] * 32]  # to two groups of 64


@pytest.mark.parametrize("tied", [True, False])
def test_whole_tensors_take_the_place_of_the_models(tmp_path: Path, tied: bool) -> None:
    """modules_to_save of PEFT: the embedding changes, and the head that it was does not."""
    table = arrays(seed=5)["language_model.embed_tokens.weight"]
    newline = arrays(seed=5)["image_newline"]
    names = ("model.language_model.embed_tokens.weight", "model.image_newline")
    tensors = dict(zip([f"base_model.model.{n}" for n in names], [table, newline], strict=True))
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    given = adapter(tmp_path / "a", "adapter_model", config, tensors)
    weights = arrays(tied=tied)
    if tied:
        weights["lm_head.weight"] = weights["language_model.embed_tokens.weight"]
    weights |= {"language_model.embed_tokens.weight": table, "image_newline": newline}
    wanted = load_checkpoint(write(tmp_path / "w", tied=False, weights=weights))
    found = load_checkpoint(write(tmp_path / "m", tied=tied), adapter=given)
    assert not found.config.tie_word_embeddings
    assert np.array_equal(logits(found.model), logits(wanted.model))
    quantized = load_checkpoint(tmp_path / "m", recipe=while_loading(8), adapter=given).model
    assert "scales" not in quantized.language_model.embed_tokens and "scales" in quantized.lm_head


def test_a_full_fine_tune_changes_the_head_that_is_the_embedding(tmp_path: Path) -> None:
    table = arrays(seed=5)["language_model.embed_tokens.weight"]
    tensors = {"language_model.model.embed_tokens.weight": table}
    given = adapter(tmp_path / "a", "adapters", {"fine_tune_type": "full"}, tensors)
    wanted = write(tmp_path / "w", weights=arrays() | {"language_model.embed_tokens.weight": table})
    found = load_checkpoint(write(tmp_path / "m"), adapter=given)
    assert found.config.tie_word_embeddings
    assert np.array_equal(logits(found.model), logits(load_checkpoint(wanted).model))


def test_what_does_not_fit_names_the_first_tensor(tmp_path: Path) -> None:
    base = write(tmp_path / "m")
    tensors = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.ones((1, 64))}
    tensors |= {"base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": np.ones((64, 1))}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    message = refusal(base, adapter(tmp_path / "a", "adapter_model", config, tensors))
    assert "model.layers.7.self_attn.q_proj.lora_A.weight: the model has no such layer" in message
    tensors = {n.replace("7", "0"): np.ones((1, 32) if "A" in n else (64, 1)) for n in tensors}
    message = refusal(base, adapter(tmp_path / "b", "adapter_model", config, tensors))
    assert "it is for a layer of 32 inputs and 64 outputs, not 64 inputs and 64" in message
    message = refusal(
        base, adapter(tmp_path / "c", "adapters", {"fine_tune_type": "full"}, tensors)
    )
    assert "the model has no such tensor" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; supported is 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model; save the adapter with"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"alpha_pattern": {"(": 3}}, "( is no regular expression"),
        (
            {"rank_pattern": {"([a-z_]|[a-z_])*!": 3}},
            "could take too long; write it with at most 3",
        ),
        ({"rank_pattern": {".*.*.*.*!": 3}}, "the pattern .*.*.*.*! could take too long"),
        ({"use_dora": True}, "no magnitude"),
        ({"rank_pattern": 5}, "rank_pattern must be an object, not 5"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
    ],
)
def test_settings_that_are_not_computed_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    assert said in refusal(write(tmp_path / "m"), peft(tmp_path / "a", **settings))


def test_a_pattern_with_groups_that_are_not_captured_is_read(tmp_path: Path) -> None:
    pattern = r".*\.layers\.(?:[5-9]|1[0-9])\.self_attn\.(?:q|k)_proj"
    given = peft(tmp_path / "a", rank_pattern={pattern: 3})
    load_checkpoint(write(tmp_path / "m"), adapter=given)


@pytest.mark.parametrize("given", [None, {"scale": None}])
def test_a_low_rank_term_without_its_scale_is_refused(
    tmp_path: Path, given: dict[str, Any] | None
) -> None:
    """Also among the whole tensors of a full fine-tune, whose settings have none."""
    kind = "full" if given is None else "lora"
    found = mlx_lm(tmp_path / "a", fine_tune_type=kind, lora_parameters=given)
    assert "scale must be a number, not None" in refusal(write(tmp_path / "m"), found)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    base, given = write(tmp_path / "m"), peft(tmp_path / "a")
    assert "has no adapter_config.json" in refusal(base, base)
    (given / "non_lora_trainables.bin").touch()
    assert "a pickle, which is never opened; save" in refusal(base, given)
    (given / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refusal(base, given)
    (given / "README.md").symlink_to(base / "config.json")
    assert "is a link that leads out of the model's folder" in refusal(base, given)
    with pytest.raises(ModelNotFoundError, match="no adapter 'nowhere'; an adapter is a folder"):
        resolve_adapter("nowhere")


def test_an_adapter_given_as_a_model_is_called_one(tmp_path: Path) -> None:
    given = peft(tmp_path / "a", base_model_name_or_path="org/base")
    with pytest.raises(OneVisionError, match="is an adapter of org/base, not a model; give the"):
        load(given)


def test_an_adapter_beside_a_model_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = peft(write(tmp_path / "m"))
    (base / "model.safetensors").rename(base / "weights.safetensors")  # whichever name it has
    with caplog.at_level(logging.WARNING):
        plain = load_checkpoint(base).model
        assert f"--adapter {base} does" in caplog.text
        caplog.clear()
        adapted = load_checkpoint(base, adapter=base).model
    assert not caplog.text
    assert not np.array_equal(logits(plain), logits(adapted))


def test_the_revision_is_that_of_both(tmp_path: Path) -> None:
    """Vectors, descriptions and prompt caches of a model and of it with an adapter are others'."""
    base, given = write(tmp_path / "m"), peft(tmp_path / "a")
    name, revision = identify(base, given)
    assert name == "m+a" and revision.startswith(identify(base)[1] + "+")
    assert identify(base, mlx_lm(tmp_path / "b"))[1] != revision
