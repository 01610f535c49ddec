"""``mlx-onevision generate`` with a model: its answers, and bad input as a person meets it."""

import json
import os
from pathlib import Path

import pytest
from checkpoints import write
from click.testing import CliRunner, Result
from commands import one_sentence, run, run_alone
from hostile.disk import full
from PIL import Image
from videos import counting

from mlx_onevision.api import Model
from mlx_onevision.cli.main import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (90, 60), (200, 30, 30)).save(path)
    return path


# What it prints.


def test_the_answer_is_the_librarys_and_stands_alone_on_stdout(
    folder: Path, model: Model, picture: Path
) -> None:
    expected = model.generate("What is it?", images=[picture], max_tokens=12)
    common = ("generate", "--model", folder, "--image", picture, "--max-tokens", "12")
    plain = run(*common, "--prompt", "What is it?")
    assert (plain.exit_code, plain.stdout, plain.stderr) == (0, expected.text + "\n", "")
    streamed = run_alone(*common, "--prompt", "-", "--stream", stdin=b"What is it?\n")
    assert (streamed.exit_code, streamed.stdout, streamed.stderr) == (0, plain.stdout, "")


def test_json_is_one_object_of_the_librarys_numbers(
    folder: Path, model: Model, picture: Path
) -> None:
    expected = model.generate("What is it?", images=[picture], max_tokens=12)
    done = run(
        *("generate", "--model", folder, "--image", picture, "--max-tokens", "12", "--json"),
        *("--prompt", "What is it?"),
    )
    assert (done.exit_code, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert set(answer) == {"text", "tokens", "finish_reason", "usage", "notes", "model"}
    assert answer["text"] == expected.text
    assert answer["tokens"] == list(expected.tokens)
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["media_tokens"] == expected.usage.media_tokens > 0
    assert answer["model"] == str(folder)


def test_a_seed_repeats_a_sampled_answer(folder: Path) -> None:
    common = ("generate", "--model", folder, "--prompt", "Describe", "--temperature", "1.5")
    first, second, other = (
        run(*common, "--seed", seed, "--max-tokens", "24", "--json") for seed in "772"
    )
    tokens = [json.loads(done.stdout)["tokens"] for done in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_prompt_cache_is_begun_with_and_written(
    folder: Path, picture: Path, tmp_path: Path
) -> None:
    file = tmp_path / "kept"
    command = ("generate", "--model", folder, "--max-tokens", "4", "--json", "--prompt-cache", file)
    system = ("--system", "one two three " * 30)
    first = run(*command, *system, "--image", picture, "--prompt", "What?")
    second = run(*command, *system, "--image", picture, "--prompt", "Why?")
    alone = run(*command[:-2], *system, "--image", picture, "--prompt", "Why?")
    found, expected = json.loads(second.stdout), json.loads(alone.stdout)
    assert (first.stderr, second.stderr) == ("", "")
    assert found["tokens"] == expected["tokens"]
    assert found["usage"]["cached_tokens"] > 64 and found["usage"]["encoded_media"] == 0
    third = run(*command, "--prompt", "another beginning " * 30)
    assert third.stderr == (
        f"{file} was not used: the prompt does not begin with the conversation in it\n"
    )
    assert third.exit_code == 0
    file.write_bytes(file.read_bytes()[:-9])
    cut = run(*command, "--prompt", "another beginning " * 30)
    assert cut.exit_code == 1 and cut.stdout == "" and file.read_bytes()
    one_sentence(cut, "is no prompt cache, or is cut off or damaged")


@pytest.mark.parametrize("form", [(), ("--json",), ("--stream",)])
def test_the_answer_is_there_where_its_cache_cannot_be_written(
    folder: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    asked = ("generate", "--model", folder, "--max-tokens", "4", "--prompt", "What?", *form)
    with full(1000):
        done = run(*asked, "--prompt-cache", tmp_path / "kept")
    assert done.exit_code == 1 and "kept" in done.stderr.splitlines()[-1]
    given, wanted = done.stdout, run(*asked).stdout
    if form == ("--json",):
        given, wanted = json.loads(given)["text"], json.loads(wanted)["text"]
    assert given == wanted


def test_a_schema_in_a_file_and_logprobs(folder: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["rot", "grün"]}', encoding="utf-8")
    arguments = ("generate", "--model", folder, "--prompt", "x", "--json-schema")
    done = run(*arguments, schema, "--json", "--logprobs", "1")
    found = json.loads(done.stdout)
    assert json.loads(found["text"]) in ("rot", "grün") and found["finish_reason"] == "stop"
    tokens = found["logprobs"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == found["text"]
    assert all(len(token["top"]) == 1 and token["logprob"] <= 0 for token in tokens)
    missing = CliRunner().invoke(cli, [*map(str, arguments), "none.json"])
    assert missing.exit_code == 1 and missing.stderr == (
        "error: none.json: No such file or directory\n"
    )


@pytest.mark.parametrize("case", ["missing", "not an image", "truncated", "empty", "a folder"])
def test_a_bad_image_is_one_sentence(
    folder: Path, picture: Path, tmp_path: Path, case: str
) -> None:
    path = tmp_path / "bad.png"
    if case == "not an image":
        path.write_text("dear diary")
    elif case == "truncated":
        noise = Image.effect_noise((64, 64), 90)
        noise.save(path)
        path.write_bytes(path.read_bytes()[:-900])
    elif case == "empty":
        path.touch()
    elif case == "a folder":
        path.mkdir()
    one_sentence(
        run("generate", "--model", folder, "--prompt", "What?", "--image", path), "bad.png"
    )


@pytest.mark.parametrize("case", ["missing", "not a video", "broken off", "a folder", "a number"])
def test_a_bad_video_is_one_sentence(folder: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.mp4"
    more: tuple[str, ...] = ()
    if case == "not a video":
        path.write_text("dear diary")
    elif case == "broken off":
        path.write_bytes(counting(9)[:-99])
    elif case == "a folder":
        path.mkdir()
    elif case == "a number":
        path.write_bytes(counting(9))
        more = ("--frames", "2000000")
    common = ("generate", "--model", folder, "--prompt", "What?", "--video", path, *more)
    if case == "a number":  # nine frames are there, and nine are used
        done = run_alone(*common)  # whose log goes to stderr
        assert done.exit_code == 0 and "9 frames" in done.stderr
    else:
        one_sentence(run(*common), "bad.mp4")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_one_sentence(folder: Path, picture: Path, prompt: str) -> None:
    common = ("generate", "--model", folder, "--image", picture, "--prompt")
    one_sentence(run(*common, prompt), "prompt")
    one_sentence(run(*common, "-", stdin=prompt), "prompt")


def test_a_prompt_that_is_not_utf8_is_one_sentence(folder: Path) -> None:
    argument = os.fsdecode(b"caf\xe9")
    one_sentence(run_alone("generate", "--model", folder, "--prompt", argument), "UTF-8")


@pytest.mark.parametrize("name", ["no/such/folder", "nonsense", ""])
def test_an_unknown_model_is_one_sentence(name: str) -> None:
    one_sentence(run("generate", "--model", name, "--prompt", "x"), f"'{name}'")


def test_a_size_without_a_network_is_one_sentence(tmp_path: Path) -> None:
    for name in ("0.5b", "llava-hf/llava-onevision-qwen2-7b-ov-hf"):
        done = run("generate", "--model", name, "--prompt", "x")  # of the tests nothing is reached
        one_sentence(done, "llava-hf/llava-onevision-qwen2-", "network")
    done = run_alone(
        *("generate", "--model", "72b", "--prompt", "x"), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    )
    one_sentence(done, "HF_HUB_OFFLINE")


def test_a_damaged_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    def ask(folder: Path) -> Result:
        return run("generate", "--model", folder, "--prompt", "x")

    empty = tmp_path / "empty"
    empty.mkdir()
    one_sentence(ask(empty), "config.json")

    bare = write(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    one_sentence(ask(bare), "safetensors")

    sharded = write(tmp_path / "sharded", shards=3)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    one_sentence(ask(sharded), "model-00002-of-00003.safetensors")

    other = write(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (other / "config.json").write_text(json.dumps(config))
    one_sentence(ask(other), "mlp")

    wordless = write(tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    one_sentence(ask(wordless), "tokenizer.json")


def test_an_image_from_stdin_and_one_by_its_address(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (40, 30), "red").save(path)
    asked = ("generate", "--model", str(folder), "--prompt", "What?", "--max-tokens", "4")
    expected = run(*asked, "--image", path).stdout
    assert run(*asked, "--image", path.as_uri()).stdout == expected
    piped = CliRunner().invoke(cli, [*asked, "--image", "-"], input=path.read_bytes())
    assert piped.stdout == expected
    twice = CliRunner().invoke(cli, [*asked, "--image", "-", "--image", "-"], input=b"a")
    assert twice.exit_code == 2 and "give '-' once" in twice.stderr
    video = Path(__file__).parents[2] / "examples/circle.mp4"
    one_sentence(
        run(*asked, "--image", video), "is a video, not an image; give it as a video (--vi"
    )
    one_sentence(run(*asked, "--video", path), "is an image, not a video; give it as an image (--i")
