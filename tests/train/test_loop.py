"""Runs: what is trained, that the loss falls, and that a run that was stopped goes on unchanged."""

import json
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write
from hostile.disk import contents, full, offsets, refusal
from mlx.utils import tree_flatten
from PIL import Image

from mlx_onevision.api import load
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import uniform
from mlx_onevision.errors import OneVisionError, OutOfMemoryError, RequestError
from mlx_onevision.network.attention import attention_mask
from mlx_onevision.train import loop, step
from mlx_onevision.train.loop import STATE, Settings, batches
from mlx_onevision.train.parts import Trained, set_up
from mlx_onevision.train.report import LOG, draw_curve
from mlx_onevision.train.step import predicted_bytes
from mlx_onevision.train.train import Task, prepare, train

ANSWERS = ("A cat.", "Two small dogs and a bird.", "Yes.", "Nothing at all.")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write(folder / "model")
    rows = []
    for number, answer in enumerate(ANSWERS):
        Image.new("RGB", (30 + 9 * number, 40), ("red", "blue")[number % 2]).save(
            folder / f"{number}.png"
        )
        ask = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "What?"}]
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": turns}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "valid.jsonl").write_text("\n".join(rows[:2]))
    return folder


def task(place: Path, output: Path, valid: bool = False, **settings: Any) -> Task:
    known = {"steps": 6, "batch": 2, "learning_rate": 5e-3, "save_every": 2, "valid_every": 2}
    return Task(
        model=place / "model",
        data=place if valid else place / "train.jsonl",
        output=output,
        cache=place / "cache",
        settings=Settings(**{**known, **settings}),
    )


def run(given: Task, stop_at: int = 0) -> list[dict[str, Any]]:
    """The log of a run, which ends at so many lines as if it were killed."""
    lines: list[Any] = []

    def on_line(line: Mapping[str, Any]) -> None:
        lines.append(line)
        if len(lines) == stop_at:
            raise Killed

    prepared = prepare(given, pytest.fail)
    if stop_at:
        with pytest.raises(Killed):
            train(given, prepared, on_line=on_line)
        return lines
    train(given, prepared, on_line=on_line)
    return [json.loads(line) for line in (given.output / LOG).read_text().splitlines()]


def losses(log: list[dict[str, Any]]) -> list[Any]:
    return [(line["step"], line.get("loss"), line.get("valid_loss")) for line in log]


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_loss_falls_and_the_adapter_is_what_was_trained(
    place: Path, tmp_path: Path, method: Any
) -> None:
    parts = ("language", "projector", "tower")
    given = task(place, tmp_path / "out", trained=Trained(method, parts, rank=4), batch=4)
    log = run(given)
    assert log[-1]["loss"] < 0.85 * log[0]["loss"]
    model = load(place / "model", adapter=given.output)
    plain = load(place / "model")
    turns = json.loads((place / "train.jsonl").read_text().splitlines()[0])["messages"]
    turns[0]["content"][0]["path"] = str(place / "0.png")
    inputs = plain.prepare(turns[:1])
    wanted = plain._processor.tokenizer.encode(ANSWERS[0])[0]
    before, after = (m.logits(inputs, last=1)[0] for m in (plain, model))
    assert after[wanted] - np.log(np.exp(after).sum()) > before[wanted] - np.log(
        np.exp(before).sum()
    )
    model.close()
    plain.close()


@pytest.mark.parametrize(
    ("stop_at", "quantize", "dropout"),
    [(1, None, 0), (2, None, 0.5), (3, 4, 0.5), (5, 4, 0), (8, None, 0)],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(
    place: Path, tmp_path: Path, stop_at: int, quantize: int | None, dropout: float
) -> None:
    whole, broken = (
        replace(
            task(place, tmp_path / name, valid=True, trained=Trained(dropout=dropout)),
            quantize=quantize,
        )
        for name in ("whole", "broken")
    )
    log = run(whole)
    run(broken, stop_at)
    assert losses(run(broken)) == losses(log)
    first, second = ((t.output / "adapters.safetensors").read_bytes() for t in (whole, broken))
    assert first == second
    assert not (broken.output / STATE).exists()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_draws_the_same_when_layers_are_computed_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    given = task(place, place / "none")
    prepared = prepare(given, pytest.fail)
    model = load_checkpoint(place / "model", fused=False).model
    set_up(model, Trained(method, ("language", "projector", "tower"), rank=4, dropout=0.5), seed=0)
    mx.random.seed(1)
    leaves: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    drawn = [(n, 0.1 * mx.random.normal(leaf.shape)) for n, leaf in leaves.items()]
    model.load_weights(drawn, strict=False)
    examples = prepared.examples
    media = [prepared.rows.prepare(example).media for example in examples]

    def computed(seed: int) -> tuple[float, dict[str, mx.array]]:
        loss, gradients = step.loss_and_gradients(model, [step.Batch(examples, media, seed)])
        return loss, dict(tree_flatten(gradients))

    model.train()
    (loss, found), (other, _) = computed(2), computed(3)
    model.eval()
    without, _ = computed(2)
    assert len({loss, other, without}) == 3
    # Without computing anything again.
    model.train()
    monkeypatch.setattr(step.nn_utils, "checkpoint", lambda _, function: function)
    whole, wanted = computed(2)
    assert loss == pytest.approx(whole, rel=1e-6)
    for name, gradient in wanted.items():
        largest = np.abs(np.array(gradient)).max()
        assert np.abs(np.array(found[name] - gradient)).max() <= 1e-5 * largest, name


def test_a_run_goes_on_where_the_disk_was_full(place: Path, tmp_path: Path) -> None:
    """In the features, the state of the run or its log."""
    whole = replace(task(place, tmp_path / "whole", steps=4), cache=tmp_path / "features")
    log = run(whole)
    largest = max(path.stat().st_size for path in [*(tmp_path / "features").rglob("*.*")])
    for number, offset in enumerate(offsets(largest)):
        place_of_run, cache = tmp_path / f"{number}", tmp_path / f"features {number}"
        broken = replace(task(place, place_of_run, steps=4), cache=cache)
        with full(offset), pytest.raises((OSError, OneVisionError)) as raised:
            run(broken)
        refusal(raised.value)
        files = [*contents(cache), *(contents(place_of_run) if place_of_run.exists() else ())]
        assert not [name for name in files if "part" in name]
        assert losses(run(broken)) == losses(log)
        for name in ("adapters.safetensors", "adapter_config.json"):
            assert (place_of_run / name).read_bytes() == (whole.output / name).read_bytes()


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_curve_is_drawn_whole_or_not_at_all(tmp_path: Path, ending: str) -> None:
    log, image = tmp_path / LOG, tmp_path / f"loss.{ending}"
    log.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(9)))
    draw_curve(log, image)
    before = contents(tmp_path)
    with full(len(before[image.name]) // 2), pytest.raises(RequestError) as raised:
        draw_curve(log, image)
    assert str(raised.value) == f"loss.{ending} cannot be written: File too large"
    assert contents(tmp_path) == before


def test_a_run_goes_on_only_as_it_began(place: Path, tmp_path: Path) -> None:
    run(task(place, tmp_path), stop_at=3)
    with pytest.raises(RequestError, match=r"a run with learning_rate 0\.005, not 0\.1; go on as"):
        run(task(place, tmp_path, learning_rate=0.1))
    for other, said in (({"quantize": 4}, "quantize None, not 4"), ({"dtype": "float16"}, "dtype")):
        with pytest.raises(RequestError, match=f"a run with {said}.*; go on as"):
            run(replace(task(place, tmp_path), **other))
    (tmp_path / STATE).write_bytes(b"?")
    with pytest.raises(RequestError, match="is damaged; delete it to start over"):
        run(task(place, tmp_path))


def test_an_adapter_is_not_overwritten(place: Path, tmp_path: Path) -> None:
    given = task(place, tmp_path, steps=1)
    run(given)
    with pytest.raises(RequestError, match="has an adapter already; name another folder"):
        run(given)


def test_patience_ends_a_run_and_the_best_adapter_is_kept(place: Path, tmp_path: Path) -> None:
    given = task(
        place, tmp_path, True, steps=40, learning_rate=3.0, schedule="constant", patience=2, clip=0
    )
    log = run(given)
    measured = [line["valid_loss"] for line in log if "valid_loss" in line]
    assert log[-1]["step"] < 40
    assert measured.index(min(measured)) == len(measured) - 3


def test_without_validation_rows_there_is_nothing_for_patience_to_count(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="no validation rows; give --valid, or leave --patience"):
        run(task(place, tmp_path / "out", patience=2))
    assert not (tmp_path / "out").exists()


def test_a_run_whose_validation_loss_is_never_finite_has_no_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "loss_sum", lambda *_: mx.array(float("nan")))
    with pytest.raises(OneVisionError, match="lower --learning-rate or with --dtype float32"):
        run(task(place, tmp_path, valid=True))
    assert (tmp_path / STATE).is_file()
    assert not (tmp_path / "adapters.safetensors").exists()


def test_accumulated_batches_are_one_larger_batch(place: Path, tmp_path: Path) -> None:
    at_once = run(task(place, tmp_path / "a", batch=4, steps=2))
    in_parts = run(task(place, tmp_path / "b", batch=2, accumulate=2, steps=2))
    for one, other in zip(at_once, in_parts, strict=True):
        assert abs(one["loss"] - other["loss"]) < 1e-5


def test_on_quantized_weights(place: Path, tmp_path: Path) -> None:
    given = replace(task(place, tmp_path, batch=4), quantize=4)
    log = run(given)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    with pytest.raises(RequestError, match="use --method lora"):
        run(replace(given, settings=Settings(trained=Trained("full"))))


def test_low_rank_terms_with_lengths_need_bits_that_fill_a_word(place: Path) -> None:
    model = load_checkpoint(place / "model", recipe=uniform(6), fused=False).model
    with pytest.raises(RequestError, match="is quantized to 6 bits; use --method lora"):
        set_up(model, Trained("dora"), seed=0)
    set_up(model, Trained(), seed=0)


def test_every_row_comes_once_an_epoch_beside_rows_of_its_length(place: Path) -> None:
    examples = prepare(task(place, place / "none"), pytest.fail).examples * 5
    found = batches(examples, Settings(batch=2))
    epoch = [next(found) for _ in range(10)]
    assert sorted(id(e) for batch in epoch for e in batch) == sorted(map(id, examples))
    assert all(abs(len(a.ids) - len(b.ids)) < 64 for a, b in epoch)
    again = batches(examples, Settings(batch=2))
    assert [[id(e) for e in batch] for batch in epoch] == [
        [id(e) for e in next(again)] for _ in range(10)
    ]


def test_the_last_layers_alone(place: Path) -> None:
    model = load_checkpoint(place / "model", fused=False).model
    set_up(model, Trained(layers=1), seed=0)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert names and all(name.startswith("language_model.layers.1.") for name in names)
    with pytest.raises(RequestError, match="the model has 2 layers, not 3"):
        set_up(load_checkpoint(place / "model", fused=False).model, Trained(layers=3), seed=0)


def test_a_step_that_does_not_fit_is_refused_before_it_is_taken(
    place: Path, tmp_path: Path
) -> None:
    given = replace(task(place, tmp_path), memory_limit=1e-3)
    with pytest.raises(OutOfMemoryError, match="a step takes about"):
        run(given)


def test_what_is_trained_counts_in_the_prediction(place: Path, tmp_path: Path) -> None:
    given = task(place, tmp_path)
    examples = prepare(given, pytest.fail).examples

    def predicted(trained: Trained, batch: int = 1) -> int:
        model = load_checkpoint(place / "model", fused=False).model
        set_up(model, trained, seed=0)
        return predicted_bytes(model, examples, batch)

    least = predicted(Trained())
    assert least < predicted(Trained(parts=("language", "tower")))
    assert least < predicted(Trained("full")) and least < predicted(Trained(), batch=4)


def test_features_are_encoded_once(place: Path, tmp_path: Path) -> None:
    given = task(place, tmp_path / "a", steps=1)
    run(given)
    times = {path: path.stat().st_mtime_ns for path in (place / "cache").rglob("*.safetensors")}
    assert len(times) >= len(ANSWERS)
    run(replace(given, output=tmp_path / "b"))
    assert times == {path: path.stat().st_mtime_ns for path in times}
    for path in times:
        modes = [stat.S_IMODE(found.stat().st_mode) for found in (path.parent, path)]
        assert modes == [0o700, 0o600]
    arrays: Any = mx.load(str(next(iter(times))))
    assert arrays["features"].ndim == 3


@pytest.mark.parametrize("window", [None, 7, 40])
def test_attention_for_some_queries_at_a_time_has_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    model = load_checkpoint(write(tmp_path), fused=False).model
    text = model.language_model
    text.windows = (window,) * len(text.layers)
    given = np.random.default_rng(0).standard_normal((2, 50, 64)).astype(np.float32)

    def whole(h: mx.array) -> mx.array:
        for layer in text.layers:
            h = layer(h, text.rotate, attention_mask(h, None, window), None)
        return (h**2).sum()

    expected, wanted = mx.value_and_grad(whole)(mx.array(given))
    for queries in (1024, 16, 7):
        monkeypatch.setattr(step, "QUERIES", queries)
        loss, got = mx.value_and_grad(lambda h: (step._hidden(model, h, Random(0)) ** 2).sum())(
            mx.array(given)
        )
        assert np.array(loss) == pytest.approx(np.array(expected), rel=1e-6)
        assert np.abs(np.array(got - wanted)).max() <= 2e-6 * np.abs(np.array(wanted)).max()
