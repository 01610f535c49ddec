"""Untrusted model folders, and shared folders that somebody else writes to."""

import gc
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from checkpoints import write
from click.testing import CliRunner

from mlx_onevision import load
from mlx_onevision.__main__ import cli
from mlx_onevision.convert.staging import Staging
from mlx_onevision.errors import CheckpointError, OneVisionError
from mlx_onevision.files import claim, replacing, save
from mlx_onevision.prompt.tokenizer import Tokenizer

SECRET = "BEGIN PRIVATE KEY"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "id_rsa"
    path.write_text(SECRET)
    return path


def sentence(action: Callable[[], Any]) -> str:
    with pytest.raises(OneVisionError) as raised:
        action()
    return str(raised.value)


# Links, pipes and devices in place of a model's files.


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "config.json", "vocab.json"])
def test_a_link_out_of_the_folder_is_neither_loaded_nor_converted(
    folder: Path, secret: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    wanted = f"{name} is a link that leads out of the model's folder; put the file itself there"
    assert sentence(lambda: load(folder)) == wanted
    target = tmp_path / "converted"
    done = CliRunner().invoke(cli, ["convert", "--model", str(folder), "--output", str(target)])
    assert done.exit_code == 1 and done.stderr.strip() == f"error: {wanted}"
    assert not target.exists()


def test_links_within_the_folder_and_into_the_hub_s_blobs_are_its_files(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "config.json").rename(folder / "kept")
    (folder / "config.json").symlink_to("kept")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")  # weights may be anywhere
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    load(folder).close()
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").replace(folder / "model.safetensors")
    folder.rename(repository / "blobs")
    snapshot.mkdir()
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    load(snapshot).close()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_and_a_device_are_refused_at_once(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    code = f"from mlx_onevision import load\nload({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"{name} is a pipe or a device; put a regular file there" in done.stderr
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"{name} is a pipe or a device; put a regular file there" in done.stderr


def test_large_json_is_refused_before_it_is_parsed(folder: Path) -> None:
    with (folder / "generation_config.json").open("w") as file:
        file.write('{"a": [' + "[]," * 1_500_000 + "[]]}")
    assert "generation_config.json is larger than 4000000 bytes" in sentence(lambda: load(folder))


# Tokenizers that take all memory or time.


def changed(folder: Path, **parts: Any) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))
    return folder


def replaced(letter: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": letter}, "content": letter * 2}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (
            {"normalizer": {"type": "Sequence", "normalizers": [replaced("a")] * 34}},
            "normalizer Replace",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "a"}}, "normalizer Prepend"),
        ({"normalizer": "NFC"}, "normalizer NFC|cannot be read"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
                    ],
                }
            },
            "another pattern than Qwen2's",
        ),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "pre_tokenizer Metaspace"),
        (
            {"added_tokens": [{"id": n, "content": f"<{n}>"} for n in range(300_000)]},
            "300,000 added tokens; 4,096 are supported",
        ),
    ],
)
def test_rules_that_are_not_qwen2_s_are_refused_by_name(
    folder: Path, parts: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        Tokenizer.from_folder(changed(folder, **parts))


def test_names_without_end_in_the_other_files_are_refused(folder: Path) -> None:
    tokens = {str(n): {"content": f"<{n}>", "special": True} for n in range(400, 30_000)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    with pytest.raises(CheckpointError, match="29,600 added tokens"):
        Tokenizer.from_folder(folder)


# What is written where others can write, too.


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared folder with somebody else's links under names that were used before."""
    place = tmp_path / "shared"
    place.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("a.srt", "a.npz"):
        (place / f".{name}.partial").symlink_to(victim)
        (place / f".{name}.{os.getpid()}.partial").symlink_to(victim)
        (place / name).symlink_to(victim)
    return place


def test_prepared_links_are_not_followed(shared: Path) -> None:
    save(shared / "a.srt", "text")
    with replacing(shared / "a.npz") as file:
        file.write(b"new")
    assert (shared.parent / "victim").read_text() == "precious"
    assert (shared / "a.srt").read_text() == "text" and not (shared / "a.srt").is_symlink()
    assert (shared / "a.npz").read_bytes() == b"new"
    with pytest.raises(OSError):
        (shared / "record").symlink_to(shared.parent / "victim")
        claim(shared / "record")


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    save(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    for wrong in (tmp_path / "none" / "a.txt", tmp_path):  # opened, and replaced
        with pytest.raises(OSError) as raised:
            save(wrong, "new")
        assert raised.value.filename == str(wrong)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def written(folder: Path) -> None:
    with replacing(folder / "made") as file:
        file.write(b"new")


def staged(folder: Path) -> None:
    with Staging(folder / "made") as new:
        (new.path / "config.json").write_text("{}")
        new.publish()


# A file that was just opened is closed by nobody but the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("make", "code"),
    [
        (written, inspect.unwrap(replacing).__code__),
        (staged, Staging.__enter__.__code__),
        (staged, Staging.publish.__code__),
    ],
)
def test_who_is_asked_to_end_at_any_moment_leaves_no_half(
    tmp_path: Path, make: Callable[[Path], None], code: CodeType
) -> None:
    """SystemExit comes before each instruction in turn, as out of the handler of a signal."""
    steps = iter(range(0))

    def trace(frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_opcodes = frame.f_code is code
        if frame.f_code is code and event == "opcode" and next(steps, None) == 0:
            raise SystemExit
        return trace

    ended, moment, before = True, 0, sys.gettrace()
    while ended:
        moment += 1
        steps, ended = iter(range(moment - 1, -1, -1)), False
        sys.settrace(trace)
        try:
            make(tmp_path)
        except SystemExit:
            ended = True
        finally:
            sys.settrace(before)
        gc.collect()
        assert {path.name for path in tmp_path.iterdir()} <= {"made"}, moment
        for path in tmp_path.iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
    assert moment > 20


def test_records_are_their_owner_s_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "vectors", private=True) as file:
        file.write(b"x")
    record = claim(tmp_path / "record")
    assert record is not None
    record.close()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"vectors": 0o600, "record": 0o600}
