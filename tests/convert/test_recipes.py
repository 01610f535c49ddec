"""Recipes: mlx-lm's own choices, and files of rules."""

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Sizes, write

from mlx_onevision.checkpoint import recipes
from mlx_onevision.checkpoint.load import load_checkpoint, open_checkpoint
from mlx_onevision.checkpoint.plan import make_plan
from mlx_onevision.checkpoint.tensors import canonical_name, written_name
from mlx_onevision.config.quantization import ModuleQuantization
from mlx_onevision.errors import OneVisionError, RequestError


@pytest.mark.parametrize("layers", [1, 7, 8, 24, 28])
def test_mixed_recipes_are_mlx_lms(tmp_path: Path, layers: int) -> None:
    """Module for module what mlx-lm itself would choose for the language model."""
    from mlx.utils import tree_flatten
    from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

    assert sorted(QUANT_RECIPES) == sorted(recipes.MIXED)
    model = load_checkpoint(
        write(tmp_path / "m", sizes=Sizes(layers=layers), tied=False), fused=False
    ).model
    modules = {
        name.removesuffix(".weight")
        for name, value in dict[str, Any](tree_flatten(model.parameters())).items()
        if name.endswith(".weight") and value.ndim == 2 and not name.startswith("vision")
    }
    for name in recipes.MIXED:
        theirs = mixed_quant_predicate_builder(name, model, 64)
        ours = recipes.mixed(name)
        for module in modules - {
            "multi_modal_projector.linear_1",
            "multi_modal_projector.linear_2",
        }:
            chosen = theirs(module, model)  # pyright: ignore[reportCallIssue]
            assert isinstance(chosen, dict)
            way = ours.spec(written_name(module), layers)
            assert way == ModuleQuantization(**chosen), module


def test_modes_are_mlx_lms() -> None:
    import inspect

    from mlx_lm.utils import quantize_model

    text = inspect.getsource(quantize_model)
    for mode, (group, bits) in recipes.MODES.items():
        assert f'"{mode}": ({group}, {bits})' in text


def test_defaults() -> None:
    recipe = recipes.uniform()
    assert recipe.spec("language_model.model.layers.0.mlp.up_proj", 2) == ModuleQuantization(64, 4)
    assert recipe.spec("language_model.lm_head", 2) == ModuleQuantization(64, 4)
    assert recipe.spec("multi_modal_projector.linear_1", 2) == ModuleQuantization(64, 8)
    assert recipe.spec("vision_tower.vision_model.encoder.layers.0.mlp.fc1", 2) == (
        ModuleQuantization(64, 8)
    )
    assert recipes.while_loading(8) == recipes.uniform(8)
    assert recipes.while_loading(None) is None


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: recipes.uniform(7), "7 bits in groups of 64 are not possible"),
        (lambda: recipes.uniform(4, 48), "groups of 48"),
        (lambda: recipes.uniform(8, mode="mxfp4"), "mxfp4 always has 4 bits in groups of 32"),
        (lambda: recipes.uniform(mode="q4_0"), "no mode 'q4_0'"),
        (lambda: recipes.mixed("mixed_5_9"), "no recipe 'mixed_5_9'"),
        (lambda: recipes.while_loading(3), "quantize is 3; while loading it is 4 or 8 bits"),
    ],
)
def test_what_is_not_possible(make: Any, wanted: str) -> None:
    with pytest.raises(RequestError, match=wanted):
        make()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("[]", "not a JSON object"),
        ("{", "not valid JSON"),
        ({"bits": 4}, "has 'bits'; it takes language, vision and rules"),
        ({"rules": {}}, "are not a list"),
        ({"rules": [{"bits": 4}]}, "rule 1 of r.json does not say which modules"),
        ({"rules": [{"modules": "*"}]}, "rule 1 of r.json does not say how"),
        ({"rules": [{"modules": "*", "bits": "4"}]}, "no whole number"),
        ({"rules": [{"modules": "*", "bits": 7}]}, "rule 1 of r.json: 7 bits"),
        ({"language": {"bit": 4}}, "language of r.json is not false or an object"),
        (
            {"rules": [{"modules": "*.mlp.upproj", "bits": 4}]},
            "matches the rule for '..mlp.upproj'",
        ),
        (
            {"rules": [{"modules": "*.lm_head", "bits": 6}]},
            r"rule for '\*.lm_head': its embedding is its head, too; use '\*.embed_tokens'",
        ),
    ],
)
def test_rules_that_are_wrong(tmp_path: Path, content: Any, wanted: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    opened = open_checkpoint(write(tmp_path / "model"))
    with pytest.raises(OneVisionError, match=wanted):
        make_plan(opened.config, opened.tensors, {}, recipe=recipes.from_file(path))


def test_rules_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no rules file"):
        recipes.from_file(tmp_path / "r.json")


def test_written_names_are_read_back() -> None:
    for name in (
        "language_model.layers.3.mlp.up_proj.weight",
        "language_model.embed_tokens.scales",
        "language_model.norm.weight",
        "lm_head.weight",
        "lm_head",
        "vision_tower.encoder.layers.0.mlp.fc1.bias",
        "multi_modal_projector.linear_1.weight",
        "image_newline",
    ):
        assert canonical_name(written_name(name)) == name
