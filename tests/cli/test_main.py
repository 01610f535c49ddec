"""The command: which options reach the library, what it prints, and how it ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from commands import COMMAND, default_sigint, run, run_alone

from mlx_onevision import api
from mlx_onevision.cli.main import cli
from mlx_onevision.engine.generation import Generation, Usage
from mlx_onevision.errors import MediaError

USAGE = Usage(
    prompt_tokens=40,
    cached_tokens=8,
    media_tokens=30,
    encoded_media=1,
    completion_tokens=5,
    prepare_seconds=0.5,
    import_seconds=1.0,
    encode_seconds=0.25,
    prefill_seconds=0.125,
    decode_seconds=2.0,
    peak_memory_bytes=3_000_000_000,
)


class FakeStream:
    """A stream of two pieces, between which it raises, if there is something to raise."""

    def __init__(self, text: str, error: BaseException | None) -> None:
        self.text = text
        self.error = error
        self.cancelled = False

    def __iter__(self) -> Iterator[str]:
        yield self.text[:6]
        if self.error:
            raise self.error
        yield self.text[6:]

    def result(self) -> Generation:
        return Generation(self.text, (1, 2, 3), "stop", USAGE)

    def cancel(self) -> None:
        self.cancelled = True


class FakeModel:
    """A model that keeps what it was asked."""

    name = "fake"

    def __init__(self, text: str = "A red square.", error: BaseException | None = None) -> None:
        self.answer = FakeStream(text, error)
        self.loaded: tuple[str, dict[str, Any]] | None = None
        self.asked: tuple[str, dict[str, Any]] | None = None
        self.closed = False

    def load(self, model: str, **options: Any) -> "FakeModel":
        self.loaded = (model, options)
        return self

    def stream(self, prompt: str, **options: Any) -> FakeStream:
        self.asked = (prompt, options)
        return self.answer

    def close(self) -> None:
        self.closed = True


def fake(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, error: BaseException | None = None
) -> tuple[Result, FakeModel]:
    """``generate`` with a fake model behind it."""
    model = FakeModel(error=error)
    monkeypatch.setattr(api, "load", model.load)
    return CliRunner().invoke(cli, ["generate", "--prompt", "What?", *arguments]), model


def test_every_option_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    result, model = fake(
        monkeypatch,
        *("--model", "7b", "--revision", "v1", "--dtype", "float16", "--quantize", "8"),
        *("--image", "a.png", "--system", "Be brief.", "--max-tokens", "9"),
        *("--video", "b.mp4", "--video", "c.gif", "--frames", "8", "--fps", "2"),
        *("--start", "1", "--end", "2.5", "--tiling", "never"),
        *("--temperature", "0.5", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1"),
        *("--repetition-penalty", "1.1", "--presence-penalty", "0.5", "--frequency-penalty", "-1"),
        *("--seed", "3", "--stop", "x", "--stop", "y"),
        *("--json-schema", '{"const": 1}', "--logprobs", "2", "--json"),
        *("--draft-model", "0.5b", "--draft-tokens", "6", "--prompt-lookup", "4"),
        *("--memory-limit", "6.5", "--kv-bits", "8", "--visual-tokens", "0.5"),
        *("--adapter", "mine"),
    )
    assert result.exit_code == 0
    loading = {"revision": "v1", "dtype": "float16", "quantize": 8}
    loading |= {"memory_limit": 6.5, "kv_bits": 8, "draft_model": "0.5b", "visual_tokens": 0.5}
    loading["adapter"] = "mine"
    assert model.loaded is not None and callable(model.loaded[1].pop("progress"))
    assert model.loaded == ("7b", loading)
    assert model.asked == (
        "What?",
        {
            "images": ("a.png",),
            "videos": ("b.mp4", "c.gif"),
            "num_frames": 8,
            "fps": 2.0,
            "start": 1.0,
            "end": 2.5,
            "tiling": "never",
            "system": "Be brief.",
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": -1.0,
            "seed": 3,
            "stop": ("x", "y"),
            "json_schema": '{"const": 1}',
            "logprobs": 2,
            "prompt_lookup": 4,
            "draft_tokens": 6,
        },
    )
    assert model.closed


def test_an_option_that_is_not_given_is_left_to_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, model = fake(monkeypatch)
    given = ("revision", "dtype", "quantize", "memory_limit", "kv_bits", "draft_model")
    assert model.loaded == ("demo", dict.fromkeys((*given, "visual_tokens", "adapter")))
    assert model.asked is not None
    options = model.asked[1]
    assert options.pop("max_tokens") is None
    assert options.pop("tiling") == "auto"
    assert not any(options.values())


def test_a_draft_length_needs_a_draft() -> None:
    done = run("generate", "--prompt", "x", "--draft-tokens", "4")
    assert done.exit_code == 2 and "--draft-tokens needs --draft-model; add it" in done.stderr


def test_a_rank_says_which_it_is_with_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a rank ignores Ctrl-C from there on
    done = run("generate", "--model", tmp_path / "none", "--prompt", "x")
    assert done.exit_code == 1 and done.stderr.startswith("error: rank 1: ")


def test_only_the_default_model_is_announced_and_only_on_stderr(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silent, _ = fake(monkeypatch, "--model", "demo")
    assert (silent.stdout, silent.stderr) == ("A red square.\n", "")
    default, _ = fake(monkeypatch)
    assert default.stdout == "A red square.\n"
    assert "demo model" in default.stderr and len(default.stderr.splitlines()) == 1


def test_verbose_says_what_it_took_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = fake(monkeypatch, "--model", "demo", "--verbose")
    assert result.stdout == "A red square.\n"
    assert result.stderr.splitlines() == [
        "prompt   40 tokens (30 of images and videos, 8 cached)",
        "prepare  0.500 s",
        "import   1.000 s",
        "encode   0.250 s",
        "prefill  0.125 s, 256.0 tok/s",
        "answer   5 tokens in 2.000 s, 2.0 tok/s",
        "memory   3.000 GB at the peak",
    ]


def test_an_answer_that_the_locale_cannot_print_is_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = FakeModel(text="Schön 🙂!")
    monkeypatch.setattr(api, "load", model.load)
    for option in ("--stream", "--no-stream"):
        result = CliRunner(charset="latin-1").invoke(
            cli, ["generate", "--model", "demo", "--prompt", "x", option]
        )
        assert (result.exit_code, result.stdout) == (0, "Schön \\U0001f642!\n")


# How it ends.


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MediaError("cannot read 'a.png'.\nIt is\n empty."), "cannot read 'a.png'. It is empty"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (
            MemoryError(),
            "out of memory; a smaller image, fewer --max-tokens or a smaller model needs less",
        ),
        (
            ValueError("odd"),
            "a defect (ValueError: odd); please report it with what the same command prints"
            " with --debug",
        ),
        (
            KeyError(),
            "a defect (KeyError); please report it with what the same command prints with --debug",
        ),
    ],
)
def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    result, model = fake(monkeypatch, "--model", "demo", error=error)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"error: {message}\n")
    assert model.answer.cancelled and model.closed


def test_debug_shows_the_traceback_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = fake(monkeypatch, "--model", "demo", "--debug", error=ValueError("odd"))
    lines = result.stderr.splitlines()
    assert result.exit_code == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: a defect (ValueError: odd)")


def test_an_interrupt_cancels_and_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result, model = fake(monkeypatch, "--model", "demo", "--stream", error=KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "A red ", "\n")
    assert model.answer.cancelled and model.closed


def endless(folder: Path) -> subprocess.Popen[bytes]:
    """A stream that goes on for as long as anybody listens."""
    options = ("--prompt", "Go on", "--max-tokens", "30000", "--stream", "--temperature", "3")
    return subprocess.Popen(
        [*COMMAND, "generate", "--model", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=default_sigint,
    )


def test_ctrl_c_ends_a_stream_at_once(folder: Path) -> None:
    process = endless(folder)
    assert process.stdout is not None and process.stdout.read(1)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == b""
    assert time.monotonic() - started < 5


def test_a_reader_that_leaves_ends_the_stream_silently(folder: Path) -> None:
    process = endless(folder)
    assert process.stdout is not None and process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err == b""
    process.stderr.close()


def test_wrong_usage_is_2() -> None:
    for arguments in (
        ["generate"],
        ["generate", "--prompt", "x", "--max-tokens", "many"],
        ["generate", "--prompt", "x", "--dtype", "int8"],
        ["generate", "--prompt", "x", "--json", "--stream"],
        ["generate", "--prompt", "x", "--logprobs", "2"],
        ["generate", "--prompt", "x", "--nonsense"],
        ["generate", "--prompt", "x", "--split", "auto"],  # one process alone
        ["paint"],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert "Usage: " in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("shares", ["half", "1,", "1,0", "-1,2", "nan,1", "inf,1", ""])
def test_a_split_is_auto_or_numbers(monkeypatch: pytest.MonkeyPatch, shares: str) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    result = CliRunner().invoke(cli, ["generate", "--prompt", "x", "--split", shares])
    assert result.exit_code == 2
    assert f"'{shares}' is neither auto nor numbers above 0, as in 30,50" in result.stderr


# How light it is.


def test_help_is_quick_and_imports_little() -> None:
    """Half a second, or where the machine is slow just now, three times what click alone takes."""
    seconds, bare = [], []
    for _ in range(5):
        started = time.perf_counter()
        done = run_alone("--help")
        seconds.append(time.perf_counter() - started)
        assert done.exit_code == 0 and "generate" in done.stdout
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import click"], check=True)
        bare.append(time.perf_counter() - started)
    assert min(seconds) < max(0.5, 3 * min(bare))
    heavy = ("mlx", "mlx_lm", "transformers", "torch", "av", "PIL", "numpy", "huggingface_hub")
    program = (
        "import sys, mlx_onevision.cli.main\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    result = CliRunner().invoke(cli, ["--version"], prog_name="mlx-onevision")
    assert result.stdout == f"mlx-onevision {version('mlx-onevision')}\n"
