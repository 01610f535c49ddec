"""The header check: what it accepts, against the safetensors library's own reader."""

import json
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from mlx_onevision.checkpoint.tensors import BITS, MAX_ITEMS, MAX_TENSORS, read_header
from mlx_onevision.errors import CheckpointError

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
