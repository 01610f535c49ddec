"""Fusing an adapter: the new model computes what the source and the adapter do together."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import features, logits
from checkpoints import arrays, layout_name, write, write_weights
from click.testing import CliRunner

from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import uniform
from mlx_onevision.convert.command import convert as command
from mlx_onevision.convert.conversion import convert
from mlx_onevision.errors import RequestError
from mlx_onevision.train.loop import Settings
from mlx_onevision.train.train import Task, prepare, train

MODULES = (
    "language_model.layers.0.self_attn.q_proj",
    "language_model.layers.1.mlp.down_proj",
    "multi_modal_projector.linear_1",
    "vision_tower.encoder.layers.0.mlp.fc1",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters: LoRA with a whole tensor, DoRA, the embedding alone."""
    folder = tmp_path_factory.mktemp("place")
    write(folder / "model")
    rng, weights = np.random.default_rng(0), arrays()
    for kind in ("lora", "dora"):
        tensors = {}
        for module in MODULES:
            outputs, inputs = weights[f"{module}.weight"].shape
            name = f"base_model.model.{layout_name(module, 'hub')}"
            tensors[f"{name}.lora_A.weight"] = 0.2 * rng.standard_normal((2, inputs))
            tensors[f"{name}.lora_B.weight"] = 0.2 * rng.standard_normal((outputs, 2))
            if kind == "dora":
                lengths = np.linalg.norm(weights[f"{module}.weight"], axis=1)
                tensors[f"{name}.lora_magnitude_vector"] = 1.1 * lengths
        if kind == "lora":
            tensors["base_model.model.image_newline"] = rng.standard_normal(64)
            module = "multi_modal_projector.linear_2.weight"
            tensors[f"base_model.model.{module}"] = 0.1 * rng.standard_normal((64, 64))
        save(folder / kind, tensors, use_dora=kind == "dora")
    table = {"base_model.model.model.embed_tokens.weight": rng.standard_normal((384, 64))}
    save(folder / "table", table)
    return folder


def save(folder: Path, tensors: dict[str, np.ndarray], **settings: Any) -> None:
    folder.mkdir()
    write_weights(folder, {name: t.astype(np.float32) for name, t in tensors.items()})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_fused_model_computes_what_both_do(place: Path, tmp_path: Path, kind: str) -> None:
    made = convert(place / "model", tmp_path / "out", adapter=place / kind)
    fused = load_checkpoint(made.target).model
    both = load_checkpoint(place / "model", adapter=place / kind).model
    assert np.abs(logits(fused) - logits(both)).max() < 2e-5
    assert np.abs(features(fused) - features(both)).max() < 2e-5
    assert np.allclose(np.array(fused.image_newline), np.array(both.image_newline))
    assert not np.allclose(logits(fused), logits(load_checkpoint(place / "model").model), atol=0.1)


def test_a_quantized_model_is_quantized_anew_as_it_was(place: Path, tmp_path: Path) -> None:
    base = convert(place / "model", tmp_path / "base", recipe=uniform(8, None, "affine", 8)).target
    made = convert(base, tmp_path / "out", adapter=place / "lora")
    fused, both = load_checkpoint(made.target), load_checkpoint(base, adapter=place / "lora")
    before = load_checkpoint(base)
    assert fused.config.quantization == before.config.quantization
    # What 8 bits lose, beside what the adapter changes.
    changed = np.abs(logits(both.model) - logits(before.model)).max()
    assert np.abs(logits(fused.model) - logits(both.model)).max() < 0.05 * changed
    # Matrices that the adapter leaves alone are the same bytes.
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    old, new = (mx.load(str(folder / "model.safetensors")) for folder in (base, made.target))
    assert mx.array_equal(old[name], new[name])  # pyright: ignore


def test_the_loss_is_that_of_quantizing(place: Path, tmp_path: Path) -> None:
    """Not of the adapter, which changes far more."""
    out = str(tmp_path / "out")
    options = ["-q", "--q-bits", "8", "--adapter", str(place / "lora"), "--json"]
    result = CliRunner().invoke(command, [str(place / "model"), out, *options])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["loss"]["all"]["kl_mean"] < 0.01
    assert report["adapter"]["adapter"] == "lora"
    card = (tmp_path / "out/README.md").read_text()
    assert "fine-tuned, quantized" in card and "| fine-tuning: r | 2 |" in card


def test_the_card_says_how_the_adapter_was_trained(place: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    adapter = tmp_path / "adapter"
    settings = Settings(steps=30, learning_rate=1e-2, valid_every=10)
    task = Task(
        place / "model",
        tmp_path / "rows.jsonl",
        adapter,
        tmp_path / "cache",
        tmp_path / "rows.jsonl",
        settings=settings,
    )
    train(task, prepare(task, pytest.fail))
    made = convert(place / "model", tmp_path / "out", adapter=adapter)
    card = (made.target / "README.md").read_text()
    for row in ("model | model", "rows | 1", "rank | 16", "learning_rate | 0.01", "steps | 30"):
        assert f"| fine-tuning: {row} |" in card
    table = card.partition("## How it was trained")[2].partition("##")[0]
    rows = [line.split(" | ") for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows][-1] == "| 30" and 10 <= len(rows) <= 12
    losses = [float(row[1]) for row in rows]
    assert losses[0] > 2 * losses[-1]
    assert rows[0][3].count("█") > 2 * rows[-1][3].count("█")
    log = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    measured = [f"{line['valid_loss']:.4f}" for line in log if "valid_loss" in line]
    assert [row[2].strip() for row in rows if row[2].strip()] == measured


def test_the_embedding_of_a_tied_model_alone_is_not_fused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="use it unfused, with --adapter"):
        convert(place / "model", tmp_path / "out", adapter=place / "table")
    assert not (tmp_path / "out").exists()
