"""Names to folders, through the real huggingface_hub client against a hub on loopback."""

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write
from fakehub import FILES, HOSTILE, UNWANTED, FakeHub
from huggingface_hub import constants

from mlx_onevision.api import load
from mlx_onevision.checkpoint.hub import ALIASES, resolve
from mlx_onevision.errors import ConfigError, ModelNotFoundError, RequestError
from mlx_onevision.plugins.adapters.engine import open_engine
from mlx_onevision.plugins.contract.requests import EmbedRequest

NAME = "org/name"
CHUNK = 1 << 12
WEIGHTS = bytes(range(256)) * 256  # 64 KiB, 16 chunks
# Contents differ from file to file: the cache keeps equal ones once.
WANTED = {name: name.encode() for name in FILES} | {"model.safetensors": WEIGHTS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub; the client writes small chunks, does not wait before it retries, and has no token."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", "/nonexistent")
    with FakeHub() as fake:
        yield fake


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refusal(model: str | Path, **settings: object) -> str:
    with pytest.raises(ModelNotFoundError) as refused:
        resolve(model, **settings)  # pyright: ignore[reportArgumentType]
    message = str(refused.value)
    assert len(message) < 300 and "\n" not in message
    return message


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/name") == Path("org/name")  # before any hub is asked
    assert resolve("~/org/name") == tmp_path / "org" / "name"


def test_demo_is_embedded_and_cannot_be_shadowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    embedded = tmp_path / "package" / "demo"
    embedded.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_onevision.checkpoint.hub.EMBEDDED", embedded)
    assert resolve("demo") == embedded
    assert resolve("./demo") == Path("demo")
    assert resolve(Path("demo")) == Path("demo")


@pytest.mark.parametrize(
    "name",
    ["nothing", "", " ", "/no/such/folder", "./a/b/c", "a/b/c", "org/na me", "../x", "~nobody/x",
     "org/..", "-org/name", "http://host/org/name", "x" * 5000, "a\0b", "org/name\n", "8b"],
)  # fmt: skip
def test_neither_folder_nor_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # with nothing beside it
    message = refusal(name)
    takes = "a folder, a Hugging Face id (org/name), 0.5b, 7b, 72b or demo"
    assert message.startswith("There is no model '") and message.endswith(takes)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert refusal(path).endswith("is a file; a model is the folder that holds it")


def test_only_hub_models_have_revisions(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no revisions"):
        resolve(tmp_path, "main")
    for revision in ("../x", "", "-x", "a\nb", "refs//x"):
        with pytest.raises(RequestError, match="is not a branch, tag or commit"):
            resolve(NAME, revision)


def test_a_download_fetches_a_model_s_files_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    repository = hub.add(NAME, WANTED | dict.fromkeys(UNWANTED, b"x"))
    folder = resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert files(folder) == WANTED
    assert hub.fetched() == set(WANTED)
    assert folder.name == repository.commit
    before = len(hub.requests)
    assert resolve(NAME, cache_dir=tmp_path, endpoint=hub.url) == folder
    assert len(hub.requests) - before == 1  # is there a newer commit?


@pytest.mark.parametrize("size", ["0.5b", "7b", "72b", "7B"])
def test_aliases_are_the_one_vision_checkpoints(hub: FakeHub, tmp_path: Path, size: str) -> None:
    name = f"llava-hf/llava-onevision-qwen2-{size.lower()}-ov-hf"
    assert ALIASES[size.lower()] == name
    hub.add(name, {"config.json": b"{}"})
    assert files(resolve(size, cache_dir=tmp_path, endpoint=hub.url)) == {"config.json": b"{}"}


def test_a_revision_is_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    repository = hub.add(NAME, {"config.json": b"{}"}, revisions=("main", "refs/pr/1"))
    for revision in ("refs/pr/1", repository.commit):
        folder = resolve(NAME, revision, cache_dir=tmp_path, endpoint=hub.url)
        assert folder.name == repository.commit
    message = refusal(NAME, revision="v9", cache_dir=tmp_path, endpoint=hub.url)
    assert message == "org/name has no revision 'v9'"


@pytest.mark.parametrize("cut", range(3000, len(WEIGHTS), len(WEIGHTS) // 10))
def test_a_broken_connection_is_taken_up_where_it_broke(
    hub: FakeHub, tmp_path: Path, cut: int
) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = [cut]
    folder = resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    found = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(found).digest() == hashlib.sha256(WEIGHTS).digest()
    kept = cut // CHUNK * CHUNK
    ranges = [request.range for request in hub.requests if request.range]
    assert ranges == ([f"bytes={kept}-"] if kept else [])


def test_a_download_that_breaks_off_for_good(hub: FakeHub, tmp_path: Path) -> None:
    """One sentence, no half file under its final name, and the next run completes it."""
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = [CHUNK] * 20
    message = refusal(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert message.startswith("The download of org/name broke off (RemoteProtocolError)")
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.cuts.clear()
    folder = resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_of_another_length_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    promised = {"model.safetensors": len(WEIGHTS) + 1}
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": WEIGHTS}, promised=promised)
    message = refusal(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert message.startswith("org/name could not be downloaded: Consistency check failed")
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize("statuses", [[500], [503, 502], [429]], ids=str)
def test_a_hub_that_stumbles(hub: FakeHub, tmp_path: Path, statuses: list[int]) -> None:
    """The client asks again for a file; what it does not ask for again is one sentence."""
    hub.add(NAME, {"config.json": b"{}"})
    hub.failures["resolve"] = list(statuses)
    assert files(resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)) == {"config.json": b"{}"}
    hub.failures["resolve"] = [404] * 9
    hub.add("org/gone", {"config.json": b"{}"})
    message = refusal("org/gone", cache_dir=tmp_path, endpoint=hub.url)
    assert message.startswith("org/gone is not in the cache, and") and "answered 404" in message
    hub.failures["api/models"] = [500]
    message = refusal("org/other", cache_dir=tmp_path, endpoint=hub.url)
    assert "org/other is not in the cache, and" in message and "answered 500; try again" in message


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another network": (
        {"model_type": "llava_onevision1_5"},
        r"'llava_onevision1_5' \(LLaVA-OneVision-1.5, another network\); only 'llava_onevision' is",
    ),
    "an older one": ({"model_type": "llava_next"}, r"\(LLaVA-NeXT\); only .*: 0.5b, 7b, 72b"),
    "another language model": (
        {"model_type": "llava_onevision", "text_config": {"model_type": "llama"}},
        "text_config has model_type 'llama'; only 'qwen2'",
    ),
    "another tower": ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "mm_vision_tower"),
    "bitsandbytes": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantization by 'bitsandbytes', which MLX cannot read; use the unquantized checkpoint",
    ),
    "awq": ({"quantization_config": {"quant_method": "awq", "group_size": 128}}, "by 'awq'"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by 'gptq'"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_cannot_be_loaded_is_refused_by_its_config(
    kind: str, hub: FakeHub, tmp_path: Path
) -> None:
    config, words = OTHERS[kind]
    hub.add(NAME, WANTED | {"config.json": json.dumps(config).encode()})
    with pytest.raises(ConfigError, match=f"{NAME}: .*{words}"):
        resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert hub.fetched() == {"config.json"}
    assert len(hub.requests) == 1


def test_an_adapter_is_refused_as_one(hub: FakeHub, tmp_path: Path) -> None:
    adapter = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}).encode()
    hub.add(NAME, {"adapter_config.json": adapter, "adapter_model.safetensors": WEIGHTS})
    message = refusal(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert message.startswith("org/name is an adapter of org/base, not a model; give the model")
    assert hub.fetched() <= {"config.json", "adapter_config.json"}


def test_no_such_repository(hub: FakeHub, tmp_path: Path) -> None:
    message = refusal("org/nothing", cache_dir=tmp_path, endpoint=hub.url)
    assert message.startswith("org/nothing is neither a folder nor a model on 127.0.0.1:")


def test_a_gated_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, {"config.json": b"{}"}, gated=True)
    message = refusal(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert message.startswith("org/name is gated: accept its terms on https://127.0.0.1:")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert files(resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)) == {"config.json": b"{}"}


def test_the_token_stays_with_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that the hub keeps elsewhere is fetched there without it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    everything = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    hub.add(NAME, everything)
    with FakeHub() as storage:
        storage.add(NAME, everything)
        hub.storage = storage.url
        caplog.set_level("DEBUG")
        folder = resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
        assert files(folder) == everything
        assert {request.token for request in hub.requests} == {"Bearer hf_secret"}
        assert [request.method for request in storage.requests] == ["GET"]
        assert storage.requests[0].token is None
        assert b"hf_secret" not in b"".join(files(tmp_path).values())
        assert "hf_secret" not in caplog.text


def test_hostile_names_write_nothing_outside(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "deep" / "er" / "cache"
    cache.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub.add(NAME, {"config.json": b"{}"}, listed=HOSTILE)
    folder = resolve(NAME, cache_dir=cache, endpoint=hub.url)
    assert files(folder) == {"config.json": b"{}"}
    assert all(path.is_relative_to(cache) for path in tmp_path.rglob("*") if path.is_file())
    assert hub.fetched() == {"config.json"}


EVIL = ("../../../../evil", "/tmp/evil", "..", "a/b", "a\\b", "", "C:evil", ".hidden", "x" * 300)


@pytest.mark.parametrize("name", EVIL)
def test_names_that_a_hub_gives_become_no_paths(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """ETags, by which the client names files, and commits, by which it names folders."""
    cache = tmp_path / "deep" / "er" / "cache"
    cache.mkdir(parents=True)
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    hub.etags["model.safetensors"] = name
    assert "which is no such name; check HF_ENDPOINT" in refusal(
        NAME, cache_dir=cache, endpoint=hub.url
    )
    hub.etags.clear()
    if name:
        hub.commit = name
        assert "which is no such name; check HF_ENDPOINT" in refusal(
            NAME, cache_dir=cache, endpoint=hub.url
        )
    assert all(path.is_relative_to(cache) for path in tmp_path.rglob("*") if path.is_file())
    hub.commit = None
    assert files(resolve(NAME, cache_dir=cache, endpoint=hub.url))["model.safetensors"] == WEIGHTS


def test_weights_are_what_the_hub_says(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    wrong = hashlib.sha256(b"other").hexdigest()
    hub.etags["model.safetensors"] = wrong
    message = refusal(NAME, cache_dir=tmp_path, endpoint=hub.url)
    assert "model.safetensors of org/name did not arrive as the Hub has it" in message
    assert not [path for path in tmp_path.rglob("*") if path.name == wrong]
    hub.etags.clear()
    folder = resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    kept = (folder / "model.safetensors").resolve()
    # What was there before is not read again: it has been used since.
    kept.write_bytes(b"changed")
    os.utime(kept, (1, 1))
    assert resolve(NAME, cache_dir=tmp_path, endpoint=hub.url) == folder


def test_a_password_in_the_address_is_not_shown(hub: FakeHub, tmp_path: Path) -> None:
    address = hub.url.replace("://", "://user:secret@")
    for name in ("org/other", NAME):
        assert "secret" not in refusal(name, cache_dir=tmp_path, endpoint=address)
    hub.__exit__()
    for name in ("org/other", NAME):
        assert "secret" not in refusal(name, cache_dir=tmp_path, endpoint=address)
    bad = "ftp://user:secret@127.0.0.1:9"
    assert "secret" not in refusal(NAME, cache_dir=tmp_path, endpoint=bad)


def test_a_cached_model_needs_no_network(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(NAME, {"config.json": b"{}"})
    folder = resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    hub.__exit__()
    assert resolve(NAME, cache_dir=tmp_path, endpoint=hub.url) == folder
    message = refusal("org/other", cache_dir=tmp_path, endpoint=hub.url)
    assert message == (
        f"org/other is not in the cache, and {hub.url[7:]} cannot be reached; "
        "connect to the network, or pass the folder of a model"
    )


def run(endpoint: str, home: Path, name: str, **environment: str) -> tuple[int, str, str]:
    """``resolve`` in a process of its own: the client reads its environment when it is imported."""
    program = (
        "import sys\nfrom mlx_onevision.errors import OneVisionError\n"
        "from mlx_onevision.checkpoint.hub import resolve\n"
        "try: print(resolve(sys.argv[1]))\n"
        "except OneVisionError as error: sys.exit(f'error: {error}')\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | environment,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_the_environment_is_honoured(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME; then HF_HUB_OFFLINE, which asks nobody anything."""
    hub.add(NAME, {"config.json": b"{}"})
    code, out, err = run(hub.url, tmp_path, NAME)
    assert (code, err) == (0, "") and Path(out).is_relative_to(tmp_path)
    asked = len(hub.requests)
    assert run(hub.url, tmp_path, NAME, HF_HUB_OFFLINE="1") == (0, out, "")
    code, _, err = run(hub.url, tmp_path, "org/other", HF_HUB_OFFLINE="1")
    assert code == 1 and err == (
        "error: org/other is not in the cache, and HF_HUB_OFFLINE is set; "
        "unset it once to download the model"
    )
    (Path(out) / "config.json").unlink()
    code, _, err = run(hub.url, tmp_path, NAME, HF_HUB_OFFLINE="1")
    assert code == 1 and err.startswith("error: org/name is only partly in the cache, and HF_HUB_O")
    assert len(hub.requests) == asked


@pytest.mark.parametrize("adapter", [False, True])
def test_loading_asks_the_hub_once(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    """Of a model that is in the cache: one request, whether there is a newer commit."""
    here = partial(resolve, cache_dir=tmp_path / "cache", endpoint=hub.url)
    monkeypatch.setattr("mlx_onevision.checkpoint.hub.resolve", here)
    hub.add(NAME, files(write(tmp_path / "model")))
    folder = here(NAME)
    hub.requests.clear()
    if adapter:
        with open_engine(NAME) as engine:
            assert engine.info().revision == folder.name
            engine.embed(EmbedRequest(items=("a",), space="joint"))
    else:
        assert load(NAME).path == folder
    assert [request.path for request in hub.requests] == [f"/api/models/{NAME}/revision/main"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_goes_to_stderr_on_a_terminal(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """One bar, of bytes. It waits half a second, which a retry makes it take here."""
    monkeypatch.undo()
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": WEIGHTS})
    hub.cuts["model.safetensors"] = [len(WEIGHTS) // 2]
    resolve(NAME, cache_dir=tmp_path, endpoint=hub.url)
    bars = [line for line in err.getvalue().replace("\r", "\n").splitlines() if "%|" in line]
    assert bool(bars) is terminal
    if terminal:
        assert bars[-1].startswith("org/name: 100%|") and "65.5k/65.5k" in bars[-1]
        assert all(bar.startswith("org/name: ") for bar in bars)
    assert out.getvalue() == ""
