"""Conversion: the same network comes out, in one layout, packed as it was asked for."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from changed_checkpoints import dequantized, edit, features, logits, quantize
from checkpoints import LAYOUTS, Sizes, arrays, write

from mlx_onevision import api
from mlx_onevision.checkpoint import manifest, recipes
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.checkpoint.recipes import Recipe
from mlx_onevision.checkpoint.tensors import read_header
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.convert.conversion import ConversionSummary, convert
from mlx_onevision.errors import CheckpointError, OneVisionError, RequestError

PLAIN = ModuleQuantization(64, 4)


def same(one: Path, other: Path, **loading: Any) -> bool:
    """Whether two folders are one network, to the bit."""
    a, b = load_checkpoint(one, **loading).model, load_checkpoint(other).model
    return bool((logits(a) == logits(b)).all() and (features(a) == features(b)).all())


def header(folder: Path) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        entries |= read_header(path)
    return entries


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("recipe", [None, recipes.uniform(4)], ids=["plain", "4 bits"])
@pytest.mark.parametrize("outer", [True, False], ids=["outer", "inner"])
def test_a_head_of_its_own_stays_where_the_configuration_ties(
    tmp_path: Path, outer: bool, recipe: Recipe | None
) -> None:
    """Whichever part of the configuration says that it is tied."""
    source = write(tmp_path / "source", tied=not outer, weights=arrays(tied=False))
    source = edit(source, tie_word_embeddings=outer)
    made = convert(source, tmp_path / "made", recipe=recipe).target
    assert config(made)["tie_word_embeddings"] is False
    assert same(source, made, recipe=recipe)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_one(tmp_path: Path, layout: str, tied: bool) -> None:
    """Bit for bit the source's logits and features, under one set of names."""
    dtype = "bfloat16" if tied else "float32"
    source = write(tmp_path / "source", layout, tied=tied, dtype=dtype)
    summary = convert(source, tmp_path / "made")
    assert same(source, summary.target)
    assert (summary.quantized, summary.padded, summary.dtype) == ({}, None, dtype)
    hub = write(tmp_path / "hub", "mlx-vlm", tied=tied, dtype=dtype)
    norm = "vision_tower.vision_model.post_layernorm"  # mlx-vlm does not load a tower without
    names = header(hub).keys() | {f"{norm}.weight", f"{norm}.bias"}
    assert header(summary.target).keys() == names
    index = json.loads((summary.target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names
    assert config(summary.target)["model_type"] == "llava_onevision"
    again = convert(summary.target, tmp_path / "again")
    assert (again.target / "model.safetensors").read_bytes() == (
        summary.target / "model.safetensors"
    ).read_bytes()


def test_a_norm_that_is_never_used_is_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    made = convert(source, tmp_path / "made").target
    name = "vision_tower.vision_model.post_layernorm.bias"
    theirs, ours = (mx.load(str(f / "model.safetensors")) for f in (source, made))
    assert isinstance(theirs, dict) and isinstance(ours, dict)
    assert mx.array_equal(theirs[name], ours[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_original_layout_gets_what_other_programs_need(tmp_path: Path, layout: str) -> None:
    source = write(tmp_path / "source", layout)
    target = convert(source, tmp_path / "made").target
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        assert (target / name).is_file()
    assert (target / "chat_template.json").is_file() or (target / "chat_template.jinja").is_file()
    before, after = api.load(source), api.load(target)
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A"}]}]
    image = np.full((40, 60, 3), 99, np.uint8)
    assert after.render(conversation) == before.render(conversation)
    given, made = (m.prepare(conversation, images=[image]) for m in (before, after))
    assert (made.input_ids == given.input_ids).all()
    assert (made.media[0].pixel_values == given.media[0].pixel_values).all()
    for model in (before, after):
        model.close()


def test_the_original_tokenizer_learns_the_placeholders(tmp_path: Path) -> None:
    """The published original ones know neither; their ids are config.json's."""
    source = write(tmp_path / "source", "lmms-lab")
    text = (source / "tokenizer.json").read_text()
    text = text.replace("<image>", "<spare_1>").replace("<video>", "<spare_2>")
    (source / "tokenizer.json").write_text(text)
    edit(source, image_token_index=320, video_token_index=321)  # the next that are free
    target = convert(source, tmp_path / "made").target
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert made.token_to_id("<image>") == 320 and made.token_to_id("<video>") == 321
    model = api.load(target)
    assert model.prepare([{"role": "user", "content": "Hi"}]).input_ids.size
    model.close()


RECIPES = [
    recipes.uniform(),
    recipes.uniform(8, 32),
    recipes.uniform(3, vision_bits=None),
    recipes.uniform(mode="mxfp4"),
    recipes.uniform(mode="nvfp4"),
    recipes.uniform(mode="mxfp8", vision_bits=6),
    recipes.mixed("mixed_2_6"),
    Recipe("tower", None, recipes.vision_spec(4)),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("layout", ["hub", "lmms-lab"])
def test_packing_is_the_same_while_loading_and_converting(
    tmp_path: Path, recipe: Recipe, layout: str
) -> None:
    dtype = "bfloat16" if layout == "hub" else "float32"
    source = write(tmp_path / "source", layout, tied=layout == "hub", dtype=dtype)
    summary = convert(source, tmp_path / "made", recipe=recipe)
    assert same(source, summary.target, recipe=recipe)
    packed = {name for name in header(summary.target) if name.endswith(".scales")}
    assert packed == {f"{module}.scales" for module in summary.specs}
    assert not any("patch" in name or "position" in name for name in packed)
    parts = ("vision_tower", "multi_modal_projector")
    assert any(name.startswith(parts) for name in packed) == (recipe.vision is not None)
    assert any(name.startswith("language") for name in packed) == (recipe.language is not None)
    values = config(summary.target)
    assert values["quantization"] == values["quantization_config"]
    if dtype == "float32":  # in half precision MLX unpacks to half precision
        whole = load_checkpoint(dequantized(summary.target, tmp_path / "whole")).model
        made = load_checkpoint(summary.target).model
        assert np.abs(logits(made) - logits(whole)).max() < 1e-4
        assert np.abs(features(made) - features(whole)).max() < 1e-4


def test_facts_are_what_was_written(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tied=False, dtype="float16")
    summary = convert(source, tmp_path / "made", recipe=recipes.uniform())
    assert summary.files == {
        path.name: path.stat().st_size
        for path in summary.target.iterdir()
        if path.name != manifest.NAME
    }
    tensors = header(summary.target)
    assert summary.nbytes == sum(entry.stop - entry.start for entry in tensors.values())
    values = sum(value.size for value in arrays(tied=False).values())
    assert summary.values == values
    assert summary.bits_per_weight == 8 * summary.nbytes / values
    assert sum(summary.quantized.values()) == len(summary.specs)
    assert json.loads(json.dumps(summary.to_dict()))["bits_per_weight"] == summary.bits_per_weight


@pytest.mark.parametrize("bits", [4, 8])
def test_a_tower_that_does_not_divide_is_padded(tmp_path: Path, bits: int) -> None:
    """As SigLIP's 4,304 to 4,352; the zeros change nothing but the order of a sum."""
    sizes = Sizes(vision_intermediate=80)
    source = write(tmp_path / "source", sizes=sizes)
    recipe = recipes.uniform(vision_bits=bits)
    summary = convert(source, tmp_path / "made", recipe=recipe)
    assert (summary.padded, summary.skipped) == (128, ())
    assert config(summary.target)["vision_config"]["intermediate_size"] == 128
    assert same(source, summary.target, recipe=recipe)
    made = header(summary.target)
    fc1, fc2 = (f"vision_tower.vision_model.encoder.layers.0.mlp.fc{n}" for n in (1, 2))
    assert made[f"{fc1}.weight"].shape == (128, 64 * bits // 32)
    assert made[f"{fc1}.bias"].shape == (128,)
    assert made[f"{fc2}.weight"].shape == (64, 128 * bits // 32)
    # The new rows are zeros, so what the second matrix multiplies is 0, whatever packing made of
    # its new columns; and the old rows are packed as they would be without the new ones.
    loaded: Any = mx.load(str(summary.target / "model.safetensors"))
    way: dict[str, Any] = {"group_size": 64, "bits": bits}
    parts = [loaded[f"{fc1}.{part}"] for part in ("weight", "scales", "biases")]
    rows = np.array(mx.dequantize(*parts, **way))
    assert (rows[80:] == 0).all() and (np.array(loaded[f"{fc1}.bias"])[80:] == 0).all()
    plain = arrays(sizes)["vision_tower.encoder.layers.0.mlp.fc1.weight"]
    unpadded = mx.dequantize(*mx.quantize(mx.array(plain), **way), **way)
    assert (rows[:80] == np.array(unpadded)).all()


def test_a_tower_whose_zeros_would_not_stay_zeros_is_left(tmp_path: Path) -> None:
    source = write(tmp_path / "source", sizes=Sizes(vision_intermediate=80))
    vision = config(source)["vision_config"] | {"hidden_act": "sigmoid"}
    summary = convert(
        edit(source, vision_config=vision), tmp_path / "made", recipe=recipes.uniform()
    )
    assert summary.padded is None
    assert [name.rpartition(".")[2] for name in summary.skipped] == ["fc2", "fc2"]
    assert same(source, summary.target, recipe=recipes.uniform())


def test_unpacking(tmp_path: Path) -> None:
    """Every matrix is what MLX unpacks; and may be packed anew."""
    plain = write(tmp_path / "plain", "mlx-vlm", dtype="bfloat16")
    parts = ("language_model", "multi_modal_projector", "vision_tower")
    for mode, bits, group in (("affine", 8, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)):
        packed = quantize(
            plain, tmp_path / mode, mode=mode, bits=bits, group_size=group, parts=parts
        )
        kept = convert(packed, tmp_path / f"{mode} kept")
        assert same(packed, kept.target)
        summary = convert(packed, tmp_path / f"{mode} whole", dequantize=True)
        assert summary.quantized == {} and summary.dtype == "bfloat16"
        assert "quantization" not in config(summary.target)
        whole = dequantized(packed, tmp_path / f"{mode} expected")
        loaded = load_checkpoint(whole, "bfloat16").model
        assert (logits(load_checkpoint(summary.target).model) == logits(loaded)).all()
        anew = convert(packed, tmp_path / f"{mode} anew", dequantize=True, recipe=RECIPES[1])
        assert same(summary.target, anew.target, recipe=RECIPES[1])


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", "mlx-vlm")
    packed = quantize(plain, tmp_path / "packed")
    cases: list[tuple[str, Path, dict[str, Any]]] = [
        ("quantized already", packed, {"recipe": recipes.uniform()}),
        ("not quantized", plain, {"dequantize": True}),
        ("dtype is 'int8'", plain, {"dtype": "int8"}),
        ("is the model to convert", plain, {"target": plain, "overwrite": True}),
        ("is the model to convert", plain, {"target": plain / "inside"}),
        ("is there already", plain, {"target": packed}),
        ("there is no folder", plain, {"target": tmp_path / "a" / "b"}),
    ]
    for wanted, source, request in cases:
        target = request.pop("target", tmp_path / "made")
        with pytest.raises(OneVisionError, match=wanted):
            convert(source, target, **request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "plain"]
    with pytest.raises(RequestError, match="quantized already"):
        load_checkpoint(packed, recipe=recipes.uniform())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    source = write(tmp_path / "source", dtype="bfloat16")
    summary = convert(source, tmp_path / "made", dtype=dtype)
    assert config(summary.target)["torch_dtype"] == summary.dtype == dtype
    assert same(source, summary.target, dtype=dtype)


def test_shards(tmp_path: Path) -> None:
    """Every tensor is in one file of the wanted size at most, or alone in it."""
    source = write(tmp_path / "source", shards=5)
    summary = convert(source, tmp_path / "made", shard_bytes=60_000, recipe=recipes.uniform(8))
    assert summary.shards > 3 and same(source, summary.target, recipe=recipes.uniform(8))
    names = sorted(path.name for path in summary.target.glob("*.safetensors"))
    count = summary.shards
    assert names == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for name in names:
        entries = read_header(summary.target / name)
        modules = {tensor.rpartition(".")[0] for tensor in entries}
        size = sum(entry.stop - entry.start for entry in entries.values())
        assert size <= 60_000 or len(modules) == 1


def test_rules_of_ones_own(tmp_path: Path) -> None:
    rules = tmp_path / "mine.json"
    rules.write_text(
        json.dumps(
            {
                "language": {"bits": 3},
                "vision": False,
                "rules": [
                    {"modules": "*.layers.0.mlp.*", "bits": 8, "group_size": 32},
                    {"modules": "*.embed_tokens", "bits": 16},
                    {"modules": "*.layers.?.mlp.down_proj", "mode": "mxfp4"},
                ],
            }
        )
    )
    source = write(tmp_path / "source")
    summary = convert(source, tmp_path / "made", recipe=recipes.from_file(rules))
    layer = "language_model.model.layers"
    assert summary.recipe == "mine"
    assert summary.specs[f"{layer}.0.mlp.down_proj"] == ModuleQuantization(32, 8)
    assert summary.specs[f"{layer}.1.mlp.down_proj"] == ModuleQuantization(32, 4, "mxfp4")
    assert summary.specs[f"{layer}.1.mlp.up_proj"] == ModuleQuantization(64, 3)
    assert "language_model.model.embed_tokens" not in summary.specs
    assert not any(name.startswith("vision") and "attn" in name for name in summary.specs)
    assert same(source, summary.target, recipe=recipes.from_file(rules))


def test_a_measure_stands_in_the_card(tmp_path: Path) -> None:
    """The seam for measuring loss: both folders can be loaded when it is called."""
    source = write(tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\ntags: [vision]\n---\n# It\n"
    )
    (source / "LICENSE").write_text("Do no harm.")
    seen = []

    def measure(before: Path, after: Path) -> str:
        seen.append(same(before, after, recipe=recipes.uniform()))
        return "| KL | 0.1 |"

    summary = convert(
        source,
        tmp_path / "made",
        recipe=recipes.uniform(),
        measure=measure,
        command="mlx-onevision convert it -q",
    )
    card = (summary.target / "README.md").read_text()
    assert seen == [True] and "| KL | 0.1 |" in card
    assert 'library_name: "mlx"' in card and 'license_name: "own"' in card
    assert '"vision"' in card and "    mlx-onevision convert it -q\n" in card
    assert (summary.target / "LICENSE").read_text() == "Do no harm."
    assert str(tmp_path) not in card


@pytest.mark.parametrize("readme", ["---\na: [\n---\n", "---\n- 1\n---\n", "---", "", "\udce4"])
def test_a_card_that_is_none(tmp_path: Path, readme: str) -> None:
    source = write(tmp_path / "source")
    (source / "README.md").write_bytes(readme.encode("utf-8", "surrogateescape"))
    card = (convert(source, tmp_path / "made").target / "README.md").read_text()
    assert card.startswith("---\nlibrary_name")


def spoil(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def test_the_loader_refuses_what_the_manifest_does_not_list(tmp_path: Path) -> None:
    summary: ConversionSummary = convert(write(tmp_path / "source"), tmp_path / "made")
    folder = summary.target
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder)
        for path in folder.iterdir():
            path.unlink()
        for name, data in whole.items():
            spoil(folder, name, data)
        load_checkpoint(folder)

    (folder / "tokenizer.json").unlink()
    refused("lacks tokenizer.json")
    spoil(folder, "config.json", whole["config.json"] + b" ")
    refused("config.json has")
    spoil(folder, "model.safetensors", whole["model.safetensors"][:-1])
    refused("model.safetensors has")
    spoil(folder, "model-00001-of-00002.safetensors", whole["model.safetensors"])
    refused("does not list")
    for bad in (
        b"{}",
        b'{"format": 2, "files": {}}',
        b"[]",
        b'{"format": 1, "files": {"../a": 1}}',
    ):
        spoil(folder, manifest.NAME, bad)
        refused("another format|not a JSON object|no valid entry")
    spoil(folder, "README.md", b"Mine")
    load_checkpoint(folder)  # the page is anyone's to edit
    (folder / manifest.NAME).unlink()
    spoil(folder, "config.json", whole["config.json"] + b" ")
    load_checkpoint(folder)
