"""``mlx-onevision convert``: options, what is printed where, exit codes, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_checkpoints import edit, quantize, write_hollow
from checkpoints import Sizes, write
from click.testing import CliRunner, Result
from commands import on_terminal

from mlx_onevision import api
from mlx_onevision.__main__ import cli
from mlx_onevision.checkpoint import hub, recipes
from mlx_onevision.convert import options as choices
from mlx_onevision.convert.conversion import convert
from mlx_onevision.errors import RequestError

COMMAND = (sys.executable, "-m", "mlx_onevision")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", "--no-verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "model", sizes=Sizes(layers=1))


def test_all_commands_are_there() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    for name in ("generate", "chat", "embed", "convert"):
        assert f"  {name} " in done.stdout


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['x', 'convert', '--help']\\n"
        "from mlx_onevision.__main__ import main\\n"
        "try:\\n    main()\\nexcept SystemExit:\\n    print(*sys.modules)"
    ).replace("\\n", "\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "mlx_onevision.convert.command" in loaded
    assert not {"mlx", "mlx.core", "numpy", "huggingface_hub", "tqdm", "mlx_lm"} & loaded


def test_help_says_what_is_done() -> None:
    text = " ".join(CliRunner().invoke(cli, ["convert", "--help"]).stdout.split())
    assert "compares with source plus adapter, so it shows the effect of quantizing only" in text
    assert (
        "An adapter is downloaded all the same" in text
    )  # its tensors are held against the model's


def test_what_is_printed(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "made", "-q", "--q-bits", "4")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "source     model"
    assert lines[1] == f"folder     {tmp_path / 'made'}"
    assert "bits a weight" in lines[2] and lines[3] == "recipe     4-bit, the rest float32"
    card = (tmp_path / "made" / "README.md").read_text()
    assert str(tmp_path) not in card and "mlx-onevision convert model made" in card


def test_the_card_names_no_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target, plot = Path("acme/secret/out"), Path("acme/plots/loss.png")
    for typed, written in (
        (["--output=/Users/jane/acme/7b", "7b"], "--output=7b 7b"),
        ([f"--model={source}", "--output=acme/secret/out"], "--model=model --output=out"),
        (["7b", "acme/secret/out", "-q", "--q-bits=4"], "7b out -q --q-bits=4"),
        (["7b", "acme/secret/out/", "--plot", str(plot)], "7b out --plot loss.png"),
        (["org/7b", "--upload-repo=me/7b"], "org/7b --upload-repo=me/7b"),
    ):
        monkeypatch.setattr(sys, "argv", ["mlx-onevision", "convert", *typed])
        assert choices.command_of("7b", target, plot) == f"mlx-onevision convert {written}"


def test_json(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "made", "--quantize-vision", "6", "--json")
    values = json.loads(result.stdout)
    assert values["quantized"] == {"6 bits, groups of 64": 14}
    assert values["files"]["config.json"] == (tmp_path / "made/config.json").stat().st_size
    assert values["seconds"] > 0 and values["dry_run"] is False
    assert {w["bits"] for w in values["specs"].values()} == {6}


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ((), None),
        (("-q",), recipes.uniform()),
        (("--q-bits", "8"), recipes.uniform(8)),
        (("-q", "--q-group-size", "32"), recipes.uniform(group_size=32)),
        (("--q-mode", "mxfp8"), recipes.uniform(mode="mxfp8")),
        (("-q", "--quantize-vision", "none"), recipes.uniform(vision_bits=None)),
        (("--recipe", "mixed_3_4"), recipes.mixed("mixed_3_4")),
        (("--quant-predicate", "mixed_2_6"), recipes.mixed("mixed_2_6")),
        (("--recipe", "mixed_3_6", "--quantize-vision", "4"), recipes.mixed("mixed_3_6", None, 4)),
        (("--recipe", "fit", "--memory", "8GB"), None),
    ],
    ids=str,
)
def test_the_options_of_packing(
    source: Path, tmp_path: Path, options: tuple[str, ...], same: recipes.Recipe | None
) -> None:
    """A dry run prints what the recipe would make, and makes nothing."""
    result = run(source, tmp_path / "made", *options, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert list(tmp_path.iterdir()) == []
    summary = convert(source, tmp_path / "made", recipe=same)
    for key in ("recipe", "nbytes", "quantized", "specs"):
        assert values[key] == summary.to_dict()[key]
    assert ("fits" in result.stderr) == ("fit" in options)


def test_fit_quantizes_anew(source: Path, tmp_path: Path) -> None:
    """The size that it prints is of what is written, not of the quantized source."""
    packed = quantize(write(tmp_path / "plain", "mlx-vlm"), tmp_path / "packed")
    arguments = ("--recipe", "fit", "--memory", "8GB", "--dequantize", "--json")
    result = run(packed, tmp_path / "made", *arguments)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["quantized"] == {}
    name, number, unit, _ = result.stderr.splitlines()[-1].split()
    assert (name, unit) == ("float32", "kB")
    assert 1000 * float(number) == pytest.approx(values["nbytes"], rel=0.01)  # but for a spare norm


def test_rules_from_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "low.json").write_text('{"language": {"bits": 2}, "vision": {"bits": 4}}')
    made = tmp_path / "made"
    result = run(source, made, "--rules", tmp_path / "low.json", "--quantize-vision", "none")
    assert result.exit_code == 0, result.output
    assert json.loads((made / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 2,
        "mode": "affine",
    }


def test_the_folder_has_a_name_of_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options in (["-q"], [], ["--dtype", "float16"], ["--recipe", "mixed_3_6"]):
        assert run(source, *options).exit_code == 0
    assert run("--hf-path", source, "elsewhere").exit_code == 0
    assert run("--model", source, "--mlx-path", "there").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["model-4-bit", "model-mlx", "model-float16", "model-mixed_3_6", "elsewhere", "there"]
    )


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((), "Say which MODEL"),
        (("a", "b", "--hf-path", "c"), "Give MODEL or --model, not both"),
        (("a", "b", "--mlx-path", "c"), "Give FOLDER or --mlx-path, not both"),
        (("a", "--recipe", "mixed_2_6", "--rules", "r.json"), "--recipe or --rules, not both"),
        (("a", "--recipe", "mixed_2_6", "--q-bits", "4"), "drop --q-bits and --q-mode"),
        (("a", "--rules", "r.json", "--q-group-size", "64"), "drop --q-group-size"),
        (("a", "--recipe", "fit"), "--recipe fit and --memory belong together"),
        (("a", "--memory", "8GB"), "--recipe fit and --memory belong together"),
        (("a", "--memory", "8 apples", "--recipe", "fit"), "is not a size such as 8GB"),
        (("a", "--memory", "0", "--recipe", "fit"), "is not a possible size"),
        (("a", "-q", "--context", "9"), "--context is for --recipe fit"),
        (("a", "--upload-repo", "../mine"), "is not a repository's id"),
        (("a", "--private"), "--private and --create-pr need --upload-repo"),
        (("a", "--q-bits", "7"), "'7' is not one of"),
        (("a", "--compare", "4", "--shard-size", "5GB", "--verify"), "drop --shard-size"),
    ],
)
def test_usage(arguments: tuple[str, ...], wanted: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and wanted in result.stderr and result.stdout == ""


def test_what_cannot_be_done(source: Path, tmp_path: Path) -> None:
    packed = quantize(write(tmp_path / "plain", "mlx-vlm"), tmp_path / "packed")
    for arguments, wanted in (
        ((source, packed), f"{packed} is there already; name another folder, or give --overwrite"),
        ((packed, tmp_path / "made", "-q"), "quantized already"),
        ((source, tmp_path / "made", "--recipe", "mixed_9_9"), "there is no recipe 'mixed_9_9'"),
        (
            (source, tmp_path / "made", "--recipe", "fit", "--memory", "1MB"),
            "nothing fits: a Mac of 0.000976562 GB",
        ),
        (("no/such/folder", tmp_path / "made"), "There is no model"),
        ((source, tmp_path / "made", "-d"), "not quantized; leave --dequantize out"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1 and wanted in result.stderr and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "made").exists()
    assert run(source, packed, "--overwrite").exit_code == 0


def test_sizes() -> None:
    for text, number in (("8GB", 8e9), ("8 gb", 8e9), ("1.5GiB", 1.5 * 2**30), ("1000", 1000)):
        assert choices.Bytes().convert(text, None, None) == number
    for text, number in (("8GB", 8 * 2**30), ("512MB", 2**29), ("1GiB", 2**30), ("7", 7)):
        assert choices.Bytes(binary=True).convert(text, None, None) == number


def test_progress_on_a_terminal_and_ctrl_c(tmp_path: Path) -> None:
    """A bar while it takes long; Ctrl-C ends with 130 and leaves nothing."""
    sizes = Sizes(hidden=1024, intermediate=4096, layers=12, heads=16, kv_heads=16, vocab=32000)
    source = write_hollow(tmp_path / "model", sizes)
    (tmp_path / "room").mkdir()
    arguments = ("convert", source, tmp_path / "room" / "made", "--dtype", "float32")
    with on_terminal(*arguments) as (process, terminal):
        seen = b""
        while b"made:" not in seen:
            seen += os.read(terminal, 1024)
        assert b"%|" in seen
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    assert list((tmp_path / "room").iterdir()) == []


# Without converting.


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_while_loading(source: Path, tmp_path: Path, bits: int) -> None:
    """The answers, and the logits bit for bit, of the folder that the converter writes."""
    target = convert(source, tmp_path / "made", recipe=recipes.uniform(bits)).target
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    models = api.load(source, quantize=bits), api.load(target)
    asked: dict[str, Any] = {"images": [image], "max_tokens": 12}
    first, second = (model.generate("What is this?", **asked) for model in models)
    assert first.tokens == second.tokens
    question = [{"role": "user", "content": "What is this?"}]
    one, other = (model.logits(model.prepare(question)) for model in models)
    assert (one == other).all()
    vectors = [model.embed([image]) for model in models]
    assert (vectors[0].vectors == vectors[1].vectors).all()
    assert vectors[0].quantization == vectors[1].quantization != None  # noqa: E711
    for model in models:
        model.close()


def test_generate_quantizes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED", source)
    arguments = ["generate", "--prompt", "What?", "--max-tokens", "5", "--json"]
    plain, packed = (
        json.loads(CliRunner().invoke(cli, [*arguments, *extra]).stdout)
        for extra in ([], ["--quantize", "4"])
    )
    target = convert(source, tmp_path / "made", recipe=recipes.uniform(4)).target
    converted = CliRunner().invoke(cli, [*arguments, "--model", str(target)])
    assert packed["tokens"] == json.loads(converted.stdout)["tokens"] != plain["tokens"]


def test_what_is_packed_is_not_packed_again(source: Path, tmp_path: Path) -> None:
    packed = quantize(write(tmp_path / "plain", "mlx-vlm"), tmp_path / "packed")
    with pytest.raises(RequestError, match="quantized already"):
        api.load(packed, quantize=4)
    with pytest.raises(RequestError, match="4 or 8 bits"):
        api.load(source, quantize=5)
    edit(packed)
