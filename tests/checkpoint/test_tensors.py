"""Weight files: which of a folder's count, and what their tensors are called."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlx_onevision.checkpoint.tensors import canonical_name, read_weights, same_bytes
from mlx_onevision.errors import CheckpointError


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"PK\x03\x04\x00\x00\x08\x08rest", "pickled"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(8), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "0 bytes"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        # the Hub's original layout, also mlx-vlm's
        ("language_model.model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("language_model.model.norm.weight", "language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("vision_tower.vision_model.embeddings.x.bias", "vision_tower.embeddings.x.bias"),
        ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.weight"),
        ("image_newline", "image_newline"),
        ("language_model.model.layers.3.mlp.up.scales", "language_model.layers.3.mlp.up.scales"),
        ("language_model.lm_head.biases", "lm_head.biases"),
        # transformers 4.52 to 4.57
        ("model.language_model.layers.0.q.weight", "language_model.layers.0.q.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.vision_model.encoder.x", "vision_tower.encoder.x"),
        ("model.multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
        ("model.image_newline", "image_newline"),
        # transformers 5
        ("vision_tower.encoder.fc1.bias", "vision_tower.encoder.fc1.bias"),
        ("model.vision_tower.encoder.fc1.bias", "vision_tower.encoder.fc1.bias"),
        # lmms-lab
        ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("model.layers.1.self_attn.q_proj.bias", "language_model.layers.1.self_attn.q_proj.bias"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("model.vision_tower.vision_tower.vision_model.embeddings.x", "vision_tower.embeddings.x"),
        ("model.mm_projector.0.weight", "multi_modal_projector.linear_1.weight"),
        ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
        # modules, as the quantization entries name them
        ("language_model.model.embed_tokens", "language_model.embed_tokens"),
        ("language_model.lm_head", "lm_head"),
        # never used
        ("vision_tower.vision_model.head.probe", None),
        ("model.vision_tower.vision_model.post_layernorm.weight", None),
        ("vision_tower.post_layernorm.bias", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        # known to nobody
        ("model.something.weight", "something.weight"),
        ("audio_tower.weight", "audio_tower.weight"),
    ],
)  # fmt: skip
def test_one_name_for_every_layout(name: str, canonical: str | None) -> None:
    assert canonical_name(name) == canonical


def save(folder: Path, name: str, *tensors: str) -> None:
    values = {t: np.full(4, len(name) + n, np.float32) for n, t in enumerate(tensors)}
    save_file(values, folder / name)


def index(folder: Path, **shards: str) -> None:
    weight_map = {t.replace("_DOT_", "."): name for t, name in shards.items()}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save(tmp_path, "weights.safetensors", "image_newline", "vision_tower.head.probe")
    tensors = read_weights(tmp_path)
    assert list(tensors) == ["image_newline"]
    tensor = tensors["image_newline"]
    assert (tensor.dtype, tensor.shape, tensor.stop - tensor.start) == ("F32", (4,), 16)


def test_the_index_says_which_shards_count(tmp_path: Path) -> None:
    save(tmp_path, "model-00001-of-00002.safetensors", "a", "b")
    save(tmp_path, "model-00002-of-00002.safetensors", "c", "b")
    save(tmp_path, "model-00001-of-00003.safetensors", "stale")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index(tmp_path, a=first, b=second, c=second)
    tensors = read_weights(tmp_path)
    assert {name: tensor.file.name for name, tensor in tensors.items()} == {
        "a": first,
        "b": second,
        "c": second,
    }


def test_a_single_file_beside_a_stale_index_counts(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    index(tmp_path, b="model-00001-of-00001.safetensors")
    assert list(read_weights(tmp_path)) == ["a"]


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a")
    save(tmp_path, "model-00001-of-00002.safetensors", "stale")
    index(tmp_path, a="model.safetensors")
    assert list(read_weights(tmp_path)) == ["a"]


def test_complete_shards_need_no_index(tmp_path: Path) -> None:
    save(tmp_path, "model-00001-of-00002.safetensors", "a")
    save(tmp_path, "model-00002-of-00002.safetensors", "b")
    assert sorted(read_weights(tmp_path)) == ["a", "b"]
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors of its 2"):
        read_weights(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, "model-00001-of-00002.safetensors", "a")
    index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors of its 2"):
        read_weights(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "model-00001-of-00001.safetensors", "a")
    index(tmp_path, a="model-00001-of-00001.safetensors", b="model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="has b; it does not"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\0.safetensors"],
)
def test_an_index_cannot_name_other_folders(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save(tmp_path, "model.safetensors", "a")
    index(folder, a=name)
    with pytest.raises(CheckpointError, match=r"outside its folder|only \.safetensors"):
        read_weights(folder)


@pytest.mark.parametrize(
    "text", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', "NaN"]
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        read_weights(tmp_path)


def test_an_index_cannot_name_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    index(tmp_path, a="pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only \.safetensors files are opened"):
        read_weights(tmp_path)


def test_several_files_without_an_index_are_ambiguous(tmp_path: Path) -> None:
    save(tmp_path, "one.safetensors", "a")
    save(tmp_path, "two.safetensors", "b")
    with pytest.raises(CheckpointError, match=r"several weight files \(one\.safetensors, two"):
        read_weights(tmp_path)


def test_no_weights_and_pickled_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        read_weights(tmp_path)


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "lm_head.weight", "language_model.lm_head.weight")
    with pytest.raises(CheckpointError, match="are the same tensor"):
        read_weights(tmp_path)


def test_same_bytes_compares_values_not_names(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((8, 8)).astype(np.float32)
    b = a.copy()
    b[-1, -1] += 1
    values = {
        "a": a,
        "again": a.copy(),
        "b": b,
        "flat": a.reshape(-1),
        "half": a.astype(np.float16),
    }
    save_file(values, tmp_path / "model.safetensors")
    tensors = read_weights(tmp_path)
    assert same_bytes(tensors["a"], tensors["again"], chunk=7)
    for other in ("b", "flat", "half"):
        assert not same_bytes(tensors["a"], tensors[other], chunk=7)
