"""Folders to models: every layout is the same network, and what is off names itself."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import dtypes, edit, features, logits, refusal
from checkpoints import LAYOUTS, Sizes, arrays, layout_name, write, write_weights
from mlx.utils import tree_flatten

from mlx_onevision.api import load
from mlx_onevision.checkpoint.hub import identify
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.tensors import written_name
from mlx_onevision.errors import CheckpointError, ConfigError, ModelNotFoundError, RequestError


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_network(
    tmp_path: Path, layout: str, tied: bool, shards: int
) -> None:
    here = load_checkpoint(write(tmp_path / "a", layout, tied=tied, shards=shards))
    reference = load_checkpoint(write(tmp_path / "b", tied=tied))
    assert here.config.tie_word_embeddings is tied
    assert np.array_equal(logits(here.model), logits(reference.model))
    assert np.array_equal(features(here.model), features(reference.model))
    assert here.generation_defaults.eos_token_ids == (2,)
    assert here.path == tmp_path / "a"


def test_weights_arrive_under_their_names(tmp_path: Path) -> None:
    """Against the values that were written: nothing is swapped, and the patches are transposed."""
    model = load_checkpoint(write(tmp_path, "lmms-lab", tied=False), fused=False).model
    loaded: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    written = arrays(tied=False)
    patches = "vision_tower.embeddings.patch_embedding.weight"
    written[patches] = written[patches].transpose(0, 2, 3, 1)
    assert set(written) - set(loaded) == {
        "vision_tower.post_layernorm.weight",
        "vision_tower.post_layernorm.bias",
    }
    for name, value in loaded.items():
        assert np.array_equal(np.array(value), written[name]), name


def test_weights_are_mapped_not_read(tmp_path: Path) -> None:
    sizes = Sizes(hidden=256, intermediate=1024, vocab=20_000)
    folder = write(tmp_path, sizes=sizes)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 20e6
    before = mx.get_active_memory()
    model = load_checkpoint(folder, dtype="bfloat16").model
    assert mx.get_active_memory() - before < size / 100
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > size / 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_checkpoint_s_dtype_is_kept(tmp_path: Path, dtype: str) -> None:
    model = load_checkpoint(write(tmp_path, dtype=dtype)).model
    assert dtypes(model) == {getattr(mx, dtype)}
    assert np.allclose(logits(model), logits(load_checkpoint(tmp_path, "float32").model), atol=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_dtype_casts(tmp_path: Path, dtype: str) -> None:
    model = load_checkpoint(write(tmp_path, dtype="float32"), dtype).model
    assert dtypes(model) == {getattr(mx, dtype)}


@pytest.mark.parametrize(
    ("named", "expected"), [("bfloat16", mx.bfloat16), ("float16", mx.float16), (None, mx.float32)]
)
def test_a_mix_of_dtypes_becomes_one(tmp_path: Path, named: str | None, expected: Any) -> None:
    """What config.json names, as the reference does it; else what most bytes have."""
    write(tmp_path, dtype="float32", shards=2)
    edit(tmp_path, torch_dtype=named)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    loaded: Any = mx.load(str(shard))
    small = {"language_model.model.norm.weight"}
    mx.save_safetensors(
        str(shard), {k: v.astype(mx.float16) if k in small else v for k, v in loaded.items()}
    )
    model = load_checkpoint(tmp_path).model
    assert dtypes(model) == {expected}


def head_folder(folder: Path, head: np.ndarray | None, *, tie: bool) -> Path:
    """A hub-layout checkpoint whose text config ties or not, with a head tensor or none."""
    weights = arrays(tied=True)
    if head is not None:
        weights["lm_head.weight"] = head
    return write(folder, weights=weights, tied=tie)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    table = arrays()["language_model.embed_tokens.weight"]
    alone = load_checkpoint(head_folder(tmp_path / "none", None, tie=True))
    equal = load_checkpoint(head_folder(tmp_path / "equal", table, tie=True))
    assert alone.config.tie_word_embeddings and equal.config.tie_word_embeddings
    assert "lm_head" not in equal.model
    assert np.array_equal(logits(alone.model), logits(equal.model))


def test_a_head_of_its_own_counts_even_where_the_config_ties(tmp_path: Path) -> None:
    head = arrays(tied=False, seed=1)["lm_head.weight"]
    asked = load_checkpoint(head_folder(tmp_path / "tie", head, tie=True))
    plain = load_checkpoint(head_folder(tmp_path / "untied", head, tie=False))
    assert not asked.config.tie_word_embeddings
    assert np.array_equal(logits(asked.model), logits(plain.model))


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    message = refusal(head_folder(tmp_path, None, tie=False))
    assert message == "The weights lack 1 tensor (lm_head.weight)"


def test_either_flag_ties(tmp_path: Path) -> None:
    folder = head_folder(tmp_path, None, tie=False)
    assert load_checkpoint(edit(folder, tie_word_embeddings=True)).config.tie_word_embeddings


def test_no_such_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere", ModelNotFoundError).endswith("nowhere is not a folder")


def test_no_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    assert "has no weights" in refusal(tmp_path)


def test_another_kind_of_model(tmp_path: Path) -> None:
    folder = edit(write(tmp_path), model_type="llama")
    assert "'llama'; only 'llava_onevision' is supported" in refusal(folder, ConfigError)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', "\ud800".encode("utf-8", "replace")])
def test_a_config_that_is_no_json_object(tmp_path: Path, text: str | bytes) -> None:
    path = write(tmp_path) / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(tmp_path).startswith("config.json is not ")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    weights = arrays()
    for name in list(weights):
        if name.startswith("multi_modal_projector"):
            del weights[name]
    assert refusal(write(tmp_path, weights=weights)) == (
        "The weights lack 4 tensors (multi_modal_projector.linear_1.weight, "
        "multi_modal_projector.linear_1.bias, multi_modal_projector.linear_2.weight, …)"
    )


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (lambda: arrays(Sizes(vision_layers=3)), "16 tensors (vision_tower.vision_model.encoder."),
        (lambda: {"value_head.weight": np.zeros((1, 64), np.float32)}, "1 tensor (value_head.we"),
        (lambda: {"language_model.notes": np.zeros(3, np.int64)}, "1 tensor (language_mod"),
    ],
    ids=["a layer", "another head", "an integer"],
)
def test_what_the_model_does_not_use_is_a_notice(
    tmp_path: Path, more: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_checkpoint(write(tmp_path / "plain"))
    found = load_checkpoint(write(tmp_path / "more", weights=more() | arrays()))
    assert f"the weights have {named}" in caplog.text
    assert caplog.text.rstrip().endswith("that the model does not use")
    names = dict(tree_flatten(plain.model.parameters())).keys()
    assert dict(tree_flatten(found.model.parameters())).keys() == names


@pytest.mark.parametrize(
    "name",
    [
        "language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "language_model.layers.1.mlp.down_proj.bias",
        "multi_modal_projector.linear_1.weight.absmax",
        "language_model.layers.0.self_attn.k_proj.qweight",
    ],
)
def test_a_second_form_of_what_is_used_is_refused(tmp_path: Path, name: str) -> None:
    weights = arrays() | {name: np.zeros((4, 4), np.float32)}
    assert refusal(write(tmp_path, weights=weights)) == (
        f"The weights have 1 tensor ({written_name(name)}) that the model of config.json has no "
        "place for"
    )


def test_what_macos_leaves_beside_files_is_no_weights(tmp_path: Path) -> None:
    """On exFAT: ``._`` and a name, a few kilobytes of something else."""
    folder = write(tmp_path, shards=2)
    before = identify(folder)
    for path in list(folder.iterdir()):
        (folder / f"._{path.name}").write_bytes(b"\0\x05\x16\x07" + bytes(60))
    load_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    load_checkpoint(folder)
    assert identify(folder) == before


@pytest.mark.parametrize(
    "name",
    "config.json tokenizer.json tokenizer_config.json generation_config.json "
    "chat_template.jinja model.safetensors preprocessor_config.json".split(),
)
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (folder / name).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{name} is .*Git LFS pointer.*'git lfs pull'"):
        load(folder)


def test_missing_and_extra_in_one_sentence(tmp_path: Path) -> None:
    weights = arrays()
    weights["image_newlines"] = weights.pop("image_newline")
    assert refusal(write(tmp_path, weights=weights)) == (
        "The weights lack 1 tensor (image_newline), and have 1 tensor (image_newlines) "
        "that the model of config.json has no place for"
    )


@pytest.mark.parametrize(
    "name",
    ["language_model.embed_tokens.weight", "vision_tower.embeddings.patch_embedding.weight"],
)
def test_a_wrong_shape_names_both(tmp_path: Path, name: str) -> None:
    weights = arrays()
    wanted = list(weights[name].shape)
    weights[name] = weights[name][:-1]
    message = refusal(write(tmp_path, weights=weights))
    assert layout_name(name, "hub") in message
    assert f"has the shape {[wanted[0] - 1, *wanted[1:]]}; config.json asks for {wanted}" in message


def test_a_wrong_config_is_seen_before_anything_is_allocated(tmp_path: Path) -> None:
    folder = write(tmp_path)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    huge = {"hidden_size": 32768, "num_attention_heads": 256, "vocab_size": 2_000_000}
    edit(folder, text_config={**text, **huge})
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    assert "asks for [" in refusal(folder)
    assert mx.get_peak_memory() - before < 1e6


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path) / "model.safetensors"
    loaded: Any = mx.load(str(path))
    name = "language_model.model.norm.weight"
    mx.save_safetensors(str(path), loaded | {name: loaded[name].astype(mx.int32)})
    assert f"{name} in model.safetensors is I32; it must be F16 or BF16 or F32" in refusal(tmp_path)


def test_patches_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, sizes=Sizes(image_size=6, patch_size=3))
    assert "at a patch size of 3 the order of its axes is ambiguous" in refusal(folder)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert refusal(tmp_path).startswith("model.safetensors is not a valid safetensors file")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'int8'; supported are float16, bfloat16, float32"):
        load_checkpoint(write(tmp_path), "int8")


def test_nothing_in_a_folder_is_executed(tmp_path: Path) -> None:
    """model_file, auto_map and trust_remote_code do nothing, and pickles are not opened."""
    folder, marker = write(tmp_path / "model"), tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()")
    (folder / "pytorch_model.bin").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    )
    edit(
        folder,
        model_file="evil.py",
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
        trust_remote_code=True,
    )
    logits(load_checkpoint(folder).model)
    assert not marker.exists()


def test_stale_shards_are_left_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, shards=2)
    write_weights(folder, {"stale": np.zeros(3, np.float32)})
    (folder / "model.safetensors").rename(folder / "model-00003-of-00003.safetensors")
    load_checkpoint(folder)
