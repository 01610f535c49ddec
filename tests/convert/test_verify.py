"""What a conversion measures before its folder takes its place: printed, drawn, and minded."""

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import arrays, write
from click.testing import CliRunner, Result
from commands import on_terminal
from PIL import Image

from mlx_onevision.__main__ import cli
from mlx_onevision.checkpoint import recipes
from mlx_onevision.checkpoint.hub import EMBEDDED
from mlx_onevision.checkpoint.load import load_checkpoint, open_checkpoint
from mlx_onevision.checkpoint.tensors import read_weights
from mlx_onevision.convert import hub as sources
from mlx_onevision.convert import verify
from mlx_onevision.convert.calibration import calibrated, calibration_set
from mlx_onevision.convert.conversion import convert, prepare
from mlx_onevision.convert.conversion import write as write_planned
from mlx_onevision.convert.loss import probes as probe_set
from mlx_onevision.convert.loss.measure import measure
from mlx_onevision.convert.loss.probes import QUICK, Probe, probes
from mlx_onevision.convert.verify import compare, suspicion
from mlx_onevision.errors import RequestError

ASKED = {"role": "user", "content": [{"type": "text", "text": "Where is the star?"}]}
FEW = [
    Probe("question", (ASKED,)),
    Probe("captions", text="A red circle and a blue square. There are two shapes."),
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("source") / "model")


def test_the_demo_model_in_8_bits(tmp_path: Path) -> None:
    """The whole fixed set; what is printed, drawn and written into the card is what was measured,
    and the aims are reached.
    """
    made, drawn = tmp_path / "made", tmp_path / "loss.png"
    result = run(EMBEDDED, made, "--q-bits", "8", "--plot", drawn, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    loss = values["loss"]
    assert (loss["result"], values["warning"], loss["dtype"]) == (str(made), None, "float32")
    assert [probe["name"] for probe in loss["probes"]] == [probe.name for probe in probes()]
    positions = [loss[name]["positions"] for name in ("all", "conversations", "texts")]
    assert positions[0] == positions[1] + positions[2]
    assert sum(probe["positions"] for probe in loss["probes"]) == positions[0]
    assert 0 < loss["all"]["kl_mean"] <= 1e-3
    assert loss["all"]["top1_agreement"] >= 0.99
    assert loss["bits_per_weight"] == pytest.approx(values["bits_per_weight"], rel=1e-3)
    card = (made / "README.md").read_text()
    assert f"{loss['all']['kl_mean']:.2e}" in card and "projector" in card
    assert str(tmp_path) not in card
    load_checkpoint(made)
    with Image.open(drawn) as picture:
        assert picture.size == (1080, 660)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "made"]


def test_what_did_not_change_is_measured_quickly(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "made")
    assert result.exit_code == 0 and result.stderr == ""
    table = result.stdout.partition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["all", "conversations", "texts"]
    assert table[1].split()[2:] == ["0", "0", "0", "100.00%"]
    summary = convert(source, tmp_path / "again")
    measured = verify.Verification(summary, unchanged=True)
    assert "100.00%" in measured(source, summary.target)
    assert measured.loss and tuple(probe.name for probe in measured.loss.probes) == QUICK


def test_what_counts_as_a_change(source: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"dtype": "float32"}, True),
        ({"dtype": "float16"}, False),
        ({"recipe": recipes.uniform(8)}, False),
    ]
    for options, same in cases:
        planned = prepare(sources.find(source), tmp_path / "made", **options)
        assert verify.is_unchanged(planned) == same
    packed = sources.find(convert(source, tmp_path / "made", recipe=recipes.uniform(8)).target)
    cases = [
        ({}, True),
        ({"dequantize": True}, False),
        # As many quantized modules, in other bits; and in the same bits, rounded once more.
        ({"dequantize": True, "recipe": recipes.uniform(4)}, False),
        ({"dequantize": True, "recipe": recipes.uniform(8)}, False),
    ]
    for options, same in cases:
        planned = prepare(packed, tmp_path / "again", **options)
        assert verify.is_unchanged(planned) == same, options


def test_a_broken_result_is_not_written(tmp_path: Path) -> None:
    """A weight that half precision cannot hold."""
    weights = arrays()
    weights["language_model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    model = write(tmp_path / "model", weights=weights)
    room = tmp_path / "room"
    room.mkdir()
    result = run(model, room / "made", "--dtype", "float16")
    assert result.exit_code == 1 and result.stdout == ""
    assert "the new model computes values that are no finite numbers" in result.stderr
    assert "--no-verify" in result.stderr and result.stderr.count("\n") == 1
    assert list(room.iterdir()) == []
    assert run(model, room / "made", "--dtype", "float16", "--no-verify").exit_code == 0
    assert "The loss against the source was not measured" not in result.stderr


def test_a_loss_that_nothing_explains_is_told(source: Path, tmp_path: Path) -> None:
    weights = arrays()
    weights["language_model.norm.weight"] *= -3
    other = write(tmp_path / "other", weights=weights)
    summary = convert(source, tmp_path / "made", recipe=recipes.uniform(8))
    near = measure(source, summary.target, probe_set=FEW)
    far = measure(source, other, probe_set=FEW)
    assert suspicion(summary, near) is None
    words = suspicion(summary, far)
    assert words and "at most 0.02 were to be expected of 8-bit" in words
    low = prepare(sources.find(source), tmp_path / "low", recipes.uniform(2)).summary
    assert suspicion(low, far) is None


@pytest.mark.parametrize("asked", [None, "--verify"])
def test_a_source_that_does_not_fit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    """Is not measured, and nobody is left in doubt; unless it was asked for."""
    monkeypatch.setattr(verify, "working_set", lambda: 192 << 20)
    options = ["-q", asked] if asked else ["-q"]
    if asked:
        options = [asked]  # unchanged, and so measured on a few probes
    result = run(source, tmp_path / "made", *options, "--json")
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert (values["loss"] is None) == (asked is None)
    assert ("warning: the loss was not measured" in result.stderr) == (asked is None)


def test_the_type_that_fits(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    half = write(tmp_path / "half", dtype="bfloat16")
    size = sum(t.stop - t.start for t in open_checkpoint(half).tensors.values())
    for room, wanted in ((2 * size, "float32"), (2 * size - 1, None)):
        monkeypatch.setattr(verify, "working_set", lambda room=room: room + (192 << 20))
        assert verify.computing_dtype(half) == wanted
        assert verify.computing_dtype(half, source) == wanted
        assert verify.too_large(half) is None


def test_ctrl_c_while_measuring_leaves_nothing(tmp_path: Path) -> None:
    with on_terminal("convert", EMBEDDED, tmp_path / "made", "-q") as (process, terminal):
        seen = b""
        while b"measuring made:" not in seen:
            seen += os.read(terminal, 1024)
        assert any(path.name.startswith(".made.") for path in tmp_path.iterdir())
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert list(tmp_path.iterdir()) == []


# Recipes beside each other.


def test_a_comparison_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither when it is done nor when it fails; and it finds what a conversion does."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[tuple[int, int]] = []
    asked = [recipes.uniform(8), recipes.mixed("mixed_2_6")]
    losses = compare(
        sources.find(source), asked, progress=lambda *at: seen.append(at), probe_set=FEW
    )
    assert list(tmp_path.iterdir()) == []
    assert [name for name, _ in losses] == ["8-bit", "mixed_2_6"]
    assert seen == [(n, 10) for n in range(1, 11)]
    folder = convert(source, tmp_path / "made", recipe=asked[1]).target
    alone = measure(source, folder, probe_set=FEW)
    assert losses[1][1].all == alone.all and losses[1][1].layers == alone.layers
    assert losses[0][1].all.kl_mean < alone.all.kl_mean

    def end(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(sources.find(source), asked, progress=end, probe_set=FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_command_compares(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(verify, "probes", lambda: FEW)
    result = run(source, "--compare", "4", "--plot", "curve.png", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert [one["recipe"] for one in values["compared"]] == ["4-bit"]
    assert values["compared"][0]["all"]["kl_mean"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (("made", "--compare", "4"), 2, "--compare writes no model; leave FOLDER out"),
        (("--compare", "4", "-q"), 2, "drop --quantize"),
        (("--compare", "4", "--dry-run"), 2, "drop --dry-run"),
        (("--compare", "4", "--no-verify"), 2, "--compare measures"),
        (("--quantize", "4"), 2, "--quantize takes no number here; give --q-bits 4"),
        (("--compare", "7"), 1, "there is no recipe '7' to compare; there are 2, 3, 4, 5, 6, 8, m"),
        (("--compare", "fit"), 1, "there is no recipe 'fit' to compare; there are 2, 3, 4, 5, 6,"),
        (("made", "--plot", "a.png", "--no-verify"), 2, "--plot draws the measured loss"),
        (("made", "--plot", "a.gif"), 2, "a.gif does not end in .png, .svg or .pdf"),
        (("made", "--plot", "nowhere/a.png"), 2, "there is no folder nowhere; make it first"),
        (("made", "--method", "gptq", "--q-bits", "3"), 1, "gptq has no 3 bits; it has 2, 4, 8"),
        (("made", "--method", "gptq", "--q-mode", "mxfp4"), 1, "gptq quantizes in affine mode"),
        (("made", "--method", "gptq", "--recipe", "mixed_2_6"), 2, "drop --recipe"),
    ],
)
def test_what_cannot_be_asked_for(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    wanted: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(source, *arguments)
    assert (result.exit_code, result.stdout) == (code, "") and wanted in result.stderr
    assert list(tmp_path.iterdir()) == []


# Calibrated.


def asked(number: int) -> Probe:
    """A small picture, and a question about it."""
    picture = probe_set.landscape(40, 50 + number, number)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    return Probe(f"{number}", ({"role": "user", "content": content},))


@pytest.mark.parametrize("tied", [True, False])
def test_a_calibrated_model_is_written_as_any_other(tmp_path: Path, tied: bool) -> None:
    """The plan's tensors to the byte, the tower as ever, and less lost on other pictures."""
    model = write(tmp_path / "model", tied=tied)
    planned = prepare(sources.find(model), tmp_path / "gptq", recipes.uniform(4))
    given = [asked(n) for n in range(6)]
    summary = write_planned(calibrated(planned, "gptq", given))
    plain = convert(model, tmp_path / "plain", recipe=recipes.uniform(4))
    assert (summary.nbytes, summary.specs) == (plain.nbytes, plain.specs)
    one, other = read_weights(summary.target), read_weights(plain.target)
    assert one.keys() == other.keys()
    differ = set()
    for name in one:
        a, b = (
            np.memmap(t.file, np.uint8, "r", t.start, t.stop - t.start)
            for t in (one[name], other[name])
        )
        assert (one[name].shape, one[name].dtype) == (other[name].shape, other[name].dtype)
        if not np.array_equal(a, b):
            differ.add(name.split(".")[0])
    assert differ == {"language_model"}
    others = [asked(n) for n in range(20, 24)]
    losses = [measure(model, f.target, probe_set=others) for f in (summary, plain)]
    assert losses[0].all.kl_mean < losses[1].all.kl_mean


def test_what_cannot_be_calibrated(source: Path, tmp_path: Path) -> None:
    find = sources.find
    mixed = prepare(find(source), tmp_path / "made", recipes.mixed("mixed_4_6"))
    with pytest.raises(RequestError, match="quantizes the whole language model alike"):
        calibrated(mixed, "gptq", [])
    wide = prepare(find(source), tmp_path / "made", recipes.uniform(4, 128))
    with pytest.raises(RequestError, match="give another --q-group-size"):
        calibrated(wide, "gptq", [])


def test_what_is_calibrated_on_is_not_what_is_measured() -> None:
    def pictures(given: Sequence[Probe]) -> set[bytes]:
        blocks: list[Any] = [
            block for probe in given for message in probe.messages for block in message["content"]
        ]
        return {b["image"].tobytes() for b in blocks if isinstance(b, dict) and "image" in b}

    calibrated_on = pictures(calibration_set())
    assert len(calibrated_on) == 8 and not calibrated_on & pictures(probes())
