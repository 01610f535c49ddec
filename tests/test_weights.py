"""Weight files: what the header check accepts, which files count, what their tensors are called."""

import json
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlx_onevision.errors import CheckpointError
from mlx_onevision.header import BITS, MAX_ITEMS, MAX_TENSORS, read_header
from mlx_onevision.weights import canonical_name, read_weights, same_bytes

MUTANTS = 5000
STRICTER = ("twice", "is not described by an object", "unknown dtype", "dimensions")


def pack(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(raw)) + raw + data


def describe(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path) -> str | None:
    try:
        read_header(path)
    except CheckpointError as error:
        return str(error)
    return None


def rust_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError):  # OSError: an empty file cannot be mapped
        return False
    return True


def random_file(rng: random.Random) -> tuple[dict[str, object], int]:
    """A valid header of a few tensors of any dtype, and how many bytes they take."""
    header: dict[str, object] = {}
    if rng.random() < 0.3:
        header["__metadata__"] = {"format": "mlx", "k": "é\U0001f600"}
    at = 0
    for n in range(rng.randint(0, 5)):
        dtype = rng.choice(list(BITS))
        shape = [rng.choice([0, 1, 2, 4, 8]) for _ in range(rng.randint(0, 4))]
        bits = int(np.prod(shape, dtype=np.int64)) * BITS[dtype]
        if bits % 8:
            shape, bits = [8, *shape], 8 * bits
        header[f"layers.{n}.w"] = describe(dtype, shape, at, at + bits // 8)
        at += bits // 8
    return header, at


def mutate(rng: random.Random, header: dict[str, object], size: int) -> bytes:
    """One random thing wrong (or harmlessly different) in the JSON, its text or the bytes."""
    strange = [
        -1, 0, 1, 7, 2**32, 2**63, 2**64 - 1, 2**64, 10**400, 1.0, 1e30, True, None, "F32", "1",
        [], [1], [2, 2], {}, {"F32": None}, "\ud800", "f32", [0] * 9, float("nan"), [[[]]],
    ]  # fmt: skip
    tensors = [info for name, info in header.items() if name != "__metadata__"]
    text_moves = ["flip", "insert", "delete", "duplicate", "space", "nest"]
    move = rng.choice(["field", "field", "extra", "metadata", "positional", *text_moves, "bytes"])
    if move == "field" and tensors:
        info = rng.choice(tensors)
        assert isinstance(info, dict)
        key = rng.choice(list(info))
        if isinstance(info[key], list) and info[key] and rng.random() < 0.7:
            place = rng.randrange(len(info[key]))
            delta = rng.choice([-2, -1, 1, 2, 4])
            info[key][place] = rng.choice([info[key][place] + delta, rng.choice(strange)])
        elif rng.random() < 0.2:
            del info[key]
        else:
            info[key] = rng.choice([*strange, *BITS])
    elif move == "extra" and tensors:
        info = rng.choice(tensors)
        assert isinstance(info, dict)
        info["more"] = rng.choice(strange)
    elif move == "metadata":
        header["__metadata__"] = rng.choice([*strange, {"a": rng.choice(strange)}])
    elif move == "positional" and tensors:
        name = rng.choice([name for name in header if name != "__metadata__"])
        info = header[name]
        assert isinstance(info, dict)
        header[name] = list(info.values())
    text = bytearray(json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="replace"))
    place = rng.randrange(len(text))
    if move == "flip":
        text[place] = rng.randrange(256)
    elif move == "insert":
        text[place:place] = rng.choice(
            [b"0", b"-", b".", b",", b"{", b"]", b"\\", b"\xff", b"\x00", b"\\ud83d", b"1e9", b" "]
        )
    elif move == "delete":
        del text[place : place + rng.randint(1, 4)]
    elif move == "duplicate":
        text[-1:] = b", " + text[1:] if len(header) else b"}"
    elif move == "space":
        text = bytearray(rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"\t", b"\x0c"])) + text + b"  "
    elif move == "nest":
        deep = rng.randint(120, 130)
        inner = b"[" * deep + b"]" * deep
        text[-1:] = (b", " if header else b"") + b'"deep": {"x": ' + inner + b"}}"
    whole = bytearray(pack(bytes(text), bytes(size)))
    if move == "bytes":
        kind = rng.choice(["length", "cut", "more"])
        if kind == "length":
            whole[rng.randrange(8)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del whole[rng.randrange(len(whole)) :]
        else:
            whole += bytes(rng.randint(1, 9))
    return bytes(whole)


def test_accepts_exactly_what_the_rust_reader_accepts(tmp_path: Path) -> None:
    """Over random damage; where only this reader refuses, it is for a reason it declares."""
    rng = random.Random(1)
    path = tmp_path / "model.safetensors"
    accepted = stricter = 0
    slowest = 0.0
    for _ in range(MUTANTS):
        header, size = random_file(rng)
        path.write_bytes(mutate(rng, header, size))
        begin = time.perf_counter()
        why = refusal(path)
        slowest = max(slowest, time.perf_counter() - begin)
        if why is None:
            assert rust_accepts(path), path.read_bytes()
            accepted += 1
        elif rust_accepts(path):
            assert any(reason in why for reason in STRICTER), (why, path.read_bytes())
            stricter += 1
    assert accepted > MUTANTS / 10 and stricter < MUTANTS / 5
    assert slowest < 1


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_has_the_format_s_size(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        pack(json.dumps({"a": describe(dtype, [8], 0, BITS[dtype])}), bytes(BITS[dtype]))
    )
    assert rust_accepts(path)
    assert read_header(path)["a"].shape == (8,)


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},', 4, "not valid JSON"),
        ('{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}', 4, "5 are needed"),
        ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}', 4, "gap"),
        (
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
            '"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            4,
            "overlap",
        ),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 5, "no tensor owns"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 3, "cut short"),
        ('{"a":{"dtype":"U9","shape":[4],"data_offsets":[0,4]}}', 4, "unknown dtype"),
        ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1, "whole bytes"),
        (
            '{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}',
            1,
            "9 dimensions",
        ),
        ('{"a":1,"a":2}', 0, "twice"),
        ("[]", 0, "not a JSON object"),
        ('{"__metadata__":{"a":1}}', 0, "metadata"),
    ],
)
def test_a_refusal_says_what_is_wrong(tmp_path: Path, header: str, data: int, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, bytes(data)))
    with pytest.raises(CheckpointError, match=why) as refused:
        read_header(path)
    assert str(refused.value).startswith("model.safetensors ")


def test_hostile_headers_stay_cheap(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    name = "n" * 10_000_000 + "\n"
    many = {f"t{n}": describe("U8", [0], 0, 0) for n in range(MAX_TENSORS + 1)}
    for header, why in (
        (json.dumps({name: 1}), "not described"),
        (json.dumps(many), f"more than {MAX_TENSORS} tensors"),
        ('{"a":[' + "0," * (MAX_ITEMS + 1) + "0]}", "items"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "JSON"),
    ):
        path.write_bytes(pack(header))
        begin = time.perf_counter()
        message = refusal(path)
        assert message is not None and why in message
        assert len(message) < 300 and "\n" not in message
        assert time.perf_counter() - begin < 1


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
