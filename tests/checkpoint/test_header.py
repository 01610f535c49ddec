"""The header check: what it accepts and reads, against the safetensors library and MLX."""

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hostile.sizes import cases
from safetensors import SafetensorError, deserialize

from mlx_onevision.checkpoint.plan import LazyTensorFiles
from mlx_onevision.checkpoint.tensors import MAX_ITEMS, MAX_TENSORS, Tensor, read_header
from mlx_onevision.errors import CheckpointError

MUTANTS = cases(1000, 10_000)
# Bits per value of every dtype that the format defines.
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


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


def library_reads(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """Every tensor's dtype, shape and bytes; None where the library refuses the file."""
    try:
        return deserialize(path.read_bytes())
    except SafetensorError:
        return None


def mlx_bytes(tensor: Tensor) -> bytes | None:
    """What MLX makes of a tensor; None where it refuses the file, or what it reads is refused."""
    try:
        array = LazyTensorFiles().take(tensor)
    except CheckpointError:
        return None
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes() if array.size else b""


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


def test_accepts_and_reads_exactly_what_the_library_does(tmp_path: Path) -> None:
    """Over random damage. And whatever MLX then reads has the same bytes."""
    rng = random.Random(1)
    path = tmp_path / "model.safetensors"
    accepted = read_by_mlx = 0
    slowest = 0.0
    for _ in range(MUTANTS):
        header, size = random_file(rng)
        content = bytearray(mutate(rng, header, size))
        content[-size:] = rng.randbytes(len(content[-size:])) if size else content[-size:]
        path.write_bytes(content)
        begin = time.perf_counter()
        why = refusal(path)
        slowest = max(slowest, time.perf_counter() - begin)
        expected = library_reads(path)
        assert (why is None) == (expected is not None), (why, bytes(content))
        if expected is None:
            continue
        accepted += 1
        tensors = read_header(path)
        assert tensors.keys() == {name for name, _ in expected}
        for name, info in expected:
            tensor = tensors[name]
            assert (tensor.dtype, list(tensor.shape)) == (info["dtype"], info["shape"])
            assert content[tensor.start : tensor.stop] == info["data"]
            if (found := mlx_bytes(tensor)) is not None:
                assert found == info["data"], bytes(content)
                read_by_mlx += 1
    assert accepted > MUTANTS / 10 and read_by_mlx > MUTANTS / 10
    assert slowest < 1


@pytest.mark.parametrize(
    ("header", "data"),
    [
        # The last of two tensors of one name counts, for MLX as for the library.
        ('{"a":["U8",[2],[2,4]],"a":["U8",[2],[0,2]],"b":["U8",[2],[2,4]]}', 4),
        (
            '{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]},'
            '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
            '"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            4,
        ),
        ('{"a":["U8",[2],[0,2]]}', 2),
        ('{"a":{"dtype":"U8","shape":[4294967297,0],"data_offsets":[0,0]}}', 0),
        ('{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', 1),
        ('{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,2]}}', 2),
    ],
)
def test_mlx_misreads_nothing_that_is_accepted(tmp_path: Path, header: str, data: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, bytes(range(data))))
    expected = library_reads(path)
    assert expected is not None
    tensors = read_header(path)
    assert all(mlx_bytes(tensors[name]) in (None, info["data"]) for name, info in expected)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_has_the_format_s_size(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        pack(json.dumps({"a": describe(dtype, [8], 0, BITS[dtype])}), bytes(BITS[dtype]))
    )
    assert library_reads(path) is not None
    tensor = read_header(path)["a"]
    assert tensor.shape == (8,) and tensor.stop - tensor.start == BITS[dtype]


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},', 4, "invalid JSON"),
        (
            '{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}',
            4,
            "invalid shape",
        ),
        (
            '{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}',
            4,
            "offset for tensor `a`",
        ),
        (
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
            '"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
            4,
            "offset for tensor `b`",
        ),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 5, "not fully covered"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 3, "not fully covered"),
        ('{"a":{"dtype":"U9","shape":[4],"data_offsets":[0,4]}}', 4, "unknown variant `U9`"),
        ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1, "byte boundary"),
        ('{"a":1,"a":2}', 0, "invalid type: integer"),
        ("[]", 0, "invalid type: sequence"),
        ('{"__metadata__":{"a":1}}', 0, "expected a string"),
    ],
)
def test_a_refusal_says_what_is_wrong(tmp_path: Path, header: str, data: int, why: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(header, bytes(data)))
    with pytest.raises(CheckpointError, match=why) as refused:
        read_header(path)
    message = str(refused.value)
    assert message.startswith("model.safetensors is not a valid safetensors file: ")
    assert message.endswith("; download or copy it again")


def test_hostile_headers_stay_cheap(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    name = "n" * 10_000_000 + "\n"
    many = {f"t{n}": describe("U8", [0], 0, 0) for n in range(MAX_TENSORS + 1)}
    for header, why in (
        (json.dumps({name: 1}), "invalid type"),
        (json.dumps(many), f"more than {MAX_TENSORS} tensors"),
        ('{"a":[' + "0," * (MAX_ITEMS + 1) + "0]}", "items"),
        ('{"a":' + "[" * 10_000 + "]" * 10_000 + "}", "JSON"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "items"),
    ):
        path.write_bytes(pack(header))
        begin = time.perf_counter()
        message = refusal(path)
        assert message is not None and why in message
        assert len(message) < 300 and "\n" not in message
        assert time.perf_counter() - begin < 1
