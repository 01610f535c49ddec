"""The benchmark: the folder it makes, what it counts and computes, and the command around it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Sizes, arrays, write
from click.testing import CliRunner, Result
from hostile.disk import contents, full
from PIL import Image

from mlx_onevision.api import load
from mlx_onevision.bench import checkpoint, measure, report
from mlx_onevision.bench.checkpoint import SIZES, Shape
from mlx_onevision.bench.programs import make_case
from mlx_onevision.bench.report import COLOURS
from mlx_onevision.checkpoint import hub
from mlx_onevision.cli.main import cli
from mlx_onevision.config.model import OneVisionConfig
from mlx_onevision.errors import OneVisionError, RequestError
from mlx_onevision.prompt.messages import normalise_messages
from mlx_onevision.prompt.processor import Processor

CONTEXT = 400  # the long row of text is cut to it
TINY = Shape(64, 2, 4, 2, 128, 152000, True, 64, 2, 4, 128, image_size=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("bench") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where temporary folders are made during these tests."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(scratch))
        yield scratch


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(
    folder: Path, scratch: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Result, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("out")
    files = ("--json", out / "numbers.json", "--plot", out / "bars.png")
    done = run("--model", folder, "--runs", 2, "--max-tokens", 4, *files)
    assert done.exit_code == 0, done.output
    return done, json.loads((out / "numbers.json").read_text()), out / "bars.png"


def test_every_row_is_measured(measured: tuple[Result, dict[str, Any], Path]) -> None:
    _, numbers, _ = measured
    rows = {row["row"]: row for row in numbers["rows"]}
    assert list(rows) == [
        *("text-20", "text-7400", "image", "images", "video", "second"),
        *("batch-1", "batch-8", "batch-16"),
    ]
    for name, row in rows.items():
        (result,) = row["results"].values()
        assert "error" not in result, result
        decode = result["decode"]
        assert len(decode["runs"]) == 2
        assert 0 < decode["min"] <= decode["median"] <= decode["max"]
        assert result["answer_tokens"] == 4 * int(name[6:] if "batch" in name else 1)
        if "batch" not in name:
            assert 0 < result["prepare"]["median"] < result["first"]["median"]
            assert row["limit"]["first"] > 0 < row["limit"]["decode"]
    machine = numbers["limits"]
    assert min(machine["copy_bytes_per_second"], machine["matrix_operations_per_second"]) > 1e6
    (program,) = numbers["programs"].values()
    assert 0 < program["load"] < program["ready"]


def test_the_inputs_have_the_reference_s_number_of_tokens(
    measured: tuple[Result, dict[str, Any], Path],
) -> None:
    """Tiles of 2 x 2 patches; the image is its base tile and 3 x 3 others, with newlines."""
    rows = {row["row"]: row for row in measured[1]["rows"]}
    media = {
        name: (row["tiles"], row["media_tokens"]) for name, row in rows.items() if "tiles" in row
    }
    assert media["image"] == (10, 4 + 6 * 7)
    assert media["images"] == (8, 8 * (4 + 1))
    assert media["video"] == (32, 32 + 1)
    assert media["text-20"] == (0, 0)
    long = rows["text-7400"]["prompt_tokens"]
    assert abs(long - (CONTEXT - 4 - measure.SPARE)) <= 2
    # The second turn takes the image from the cache, and the first row of all does not.
    assert rows["second"]["results"]["mlx-onevision"]["cached_tokens"] > 46
    assert rows["image"]["results"]["mlx-onevision"]["cached_tokens"] == 0


def test_what_is_printed(
    measured: tuple[Result, dict[str, Any], Path], folder: Path, scratch: Path
) -> None:
    done, _, plot = measured
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny, float32, on ")
    assert [line for line in lines if line.startswith("text-7400  mlx-onevision")]
    assert "a batch of 8 makes" in done.stdout
    assert "bench: video: mlx-onevision, run 2 of 2" in done.stderr
    assert not list(scratch.iterdir())
    for path in (folder.parent, scratch):
        assert str(path) not in done.output + json.dumps(measured[1])
    with Image.open(plot) as image:
        colour = tuple(int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
        found = image.convert("RGB").getcolors(1 << 20) or []
    assert {at: n for n, at in found}[colour] > 1000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "Give either --size 0.5b, 7b or 72b, or --model MODEL"),
        (("--model", "demo", "--size", "7b"), "Give either --size"),
        (("--model", "demo", "--layers", 2), "--layers cuts a --size"),
        (("--model", "demo", "--rows", ","), "--rows names no row; there are text, image"),
        (("--model", "demo", "--rows", "text,film"), "'film' is none of text, image, images"),
        (("--size", "7b", "--versus", "vllm"), "'vllm' is none of mlx-vlm, transformers"),
        (("--size", "7b", "--quantize", 4, "--versus", "transformers"), "drop --quantize, or it"),
        (("--size", "7b", "--json", "no/where.json"), "there is no folder no; make it first"),
        (("--size", "7b", "--plot", "bars.gif"), "bars.gif does not end in .png"),
        (("--model", "no/such"), "no/such"),
        (("--model", "demo", "--adapter", "a", "--versus", "mlx-vlm"), "would measure without it"),
        (("--model", "demo", "--adapter", "no/where/a"), "There is no adapter 'no/where/a'"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_measured(
    given: tuple[object, ...], said: str
) -> None:
    done = run(*given)
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.output and "bench:" not in done.stderr


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    done = run("--size", "7b", "--versus", "mlx-vlm")
    assert done.stderr == (
        "error: mlx-vlm cannot be measured because mlx-vlm is not installed here; "
        "pip install mlx-vlm, or leave mlx-vlm out of --versus\n"
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_leave_nothing_behind(
    folder: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    started: list[subprocess.Popen[str]] = []

    class Kept(measure.Child):
        def __init__(self, *given: Any) -> None:
            threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
            try:
                super().__init__(*given)
            finally:
                started.append(self._process)

    monkeypatch.setattr(measure, "Child", Kept)
    done = run("--model", folder, "--rows", "batch", "--runs", 1000)
    assert (done.exit_code, done.stdout) == (code, "")
    assert "Traceback" not in done.output
    assert not list(scratch.iterdir())
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_the_memory_options_are_those_of_the_model_that_is_measured(folder: Path) -> None:
    refused = run("--model", folder, "--rows", "batch", "--memory-limit", "0.0001")
    assert refused.exit_code == 1 and "the limit is 0.10 MB" in refused.output
    refused = run("--model", folder, "--rows", "batch", "--kv-bits", "8")
    assert refused.exit_code == 1 and "leave --kv-bits out" in refused.output


def test_an_adapter_of_the_hub_is_downloaded_before_the_programs_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Asked(measure.Child):
        def __init__(self, name: str, folder: Path, memory: Mapping[str, Any]) -> None:
            asked.append(memory["adapter"])
            raise OneVisionError("stop")

    monkeypatch.setattr(hub, "_download", lambda *_: tmp_path / "snapshot")
    monkeypatch.setattr(measure, "Child", Asked)
    run("--model", folder, "--adapter", "org/name", "--rows", "batch")
    assert asked == [str(tmp_path / "snapshot")]


def test_a_row_that_this_program_cannot_answer_fails_the_command(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "numbers.json"
    done = run(
        "--model", folder, "--rows", "text", "--max-tokens", 4096, "--runs", 1, "--json", out
    )
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == (
        "error: mlx-onevision did not answer text-20, text-7400; the table says why"
    )
    assert "text-20, mlx-onevision: " in done.stdout
    assert "error" in json.loads(out.read_text())["rows"][0]["results"]["mlx-onevision"]


def test_files_are_written_whole_or_not_at_all(
    measured: tuple[Result, dict[str, Any], Path],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = measured[1]
    monkeypatch.setattr(measure, "measure", lambda *_, **__: numbers)
    monkeypatch.setattr(checkpoint, "without_end", lambda _, source: source)
    for option, name in (("--json", "numbers.json"), ("--plot", "bars.png")):
        path = tmp_path / name
        assert run("--model", folder, option, path).exit_code == 0
        before = contents(tmp_path)
        with full(path.stat().st_size // 2):
            done = run("--model", folder, option, path)
        assert done.stderr.endswith(f"error: {name} cannot be written: File too large\n")
        assert contents(tmp_path) == before


def test_more_layers_than_a_size_has(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has 2 layers, so --layers 3 is too many; give at"):
        checkpoint.make_random(
            tmp_path / "random", TINY, layers=3, dtype="bfloat16", say=lambda _: None
        )


def test_random_weights_load_and_never_end(tmp_path: Path) -> None:
    made = checkpoint.make_random(
        tmp_path / "random", TINY, layers=1, dtype="bfloat16", say=lambda _: None
    )
    model = load(checkpoint.without_end(tmp_path / "model", made))
    try:
        case = make_case("image", 1)
        answer = model.generate(messages=case.messages, max_tokens=10)
        assert model.config.text_config.num_hidden_layers == 1
        assert (answer.finish_reason, len(answer.tokens)) == ("length", 10)
        assert answer.usage.media_tokens == 46
    finally:
        model.close()


def test_the_published_shapes(tmp_path: Path) -> None:
    """Parameters as the Hub counts them (the tower's last norm aside), and the 10-tile image."""
    counted = {
        size: sum(prod(dims) for _, dims in checkpoint.tensors(SIZES[size])) for size in SIZES
    }
    assert {size: round(n / 1e7) for size, n in counted.items()} == {
        "0.5b": 89,
        "7b": 803,
        "72b": 7318,
    }
    checkpoint.write_settings(tmp_path, SIZES["7b"], "bfloat16")
    config = OneVisionConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    processor = Processor.from_folder(tmp_path, config)
    try:
        prepared = processor.prepare(normalise_messages(messages=make_case("image", 0).messages))
    finally:
        processor.template.close()
    assert [medium.tiles.shape for medium in prepared.media] == [(10, 384, 384, 3)]
    assert (prepared.input_ids == 151646).sum() == 729 + 81 * 82
    assert len(prepared.input_ids) == 7386
    assert processor.tokenizer.decode([300, 20_000]).count(" ") == 2


def test_costs_count_what_a_token_needs(folder: Path, tmp_path: Path) -> None:
    """Against sums over the weights themselves; 4 bytes a value."""
    untied = write(tmp_path / "untied", tied=False)
    weights = arrays(Sizes(), tied=False)
    text = {n: v for n, v in weights.items() if n.startswith(("language_model", "lm_head"))}
    looked_up = text["language_model.embed_tokens.weight"]
    costs, tied = measure.Costs(untied), measure.Costs(folder)
    assert costs.step_bytes == 4 * (sum(v.size for v in text.values()) - looked_up.size)
    assert tied.step_bytes == costs.step_bytes
    assert costs.decode_bytes(100) - costs.decode_bytes(0) == 100 * 2 * 2 * 2 * 16 * 4

    matrices = sum(v.size for n, v in text.items() if v.ndim == 2) - looked_up.size - 384 * 64
    attention = 2 * 2 * 64  # two layers, scores and values, 64 wide
    linear = costs.operations(0, 10) - 2 * 384 * 64
    assert linear == 2 * (10 * matrices + attention * 55)
    cached = costs.operations(0, 10, 6) - 2 * 384 * 64
    assert cached == 2 * (4 * matrices + attention * (55 - 21))

    tower = [v for n, v in weights.items() if n.startswith(("vision_tower", "multi_modal"))]
    per_patch = sum(v.size for v in tower if v.ndim in (2, 4)) - 4 * 64  # but the positions
    scores = 2 * 2 * 4 * 64  # two layers, four patches
    assert costs.operations(3, 10) - costs.operations(0, 10) == 2 * 3 * 4 * (per_patch + scores)


def test_ratios() -> None:
    ours = {"first": {"median": 1.0}, "decode": {"median": 30.0}, "memory": {"median": 2}}
    other = {"first": {"median": 2.0}, "decode": {"median": 10.0}, "memory": None}
    assert report.ratios(ours, other) == {"first": 0.5, "decode": 3.0}
    assert report.ratios({"error": "no"}, other) == {}
