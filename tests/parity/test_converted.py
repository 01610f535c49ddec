"""Folders that this package's converter wrote, in mlx-vlm: it loads them and answers the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity.cases import ask, picture
from parity.checkpoints import Tiny
from parity.layouts import to_lmms_lab, to_sharded, to_transformers_4_52
from parity.ours import Ours
from parity.pairs import Checkpoints
from parity.peer import ask_mlx_vlm

from mlx_onevision.checkpoint import recipes
from mlx_onevision.convert.conversion import convert

TOKENS = 24
# Of these widths, all but the tower's 144 divide into groups of 64; that is padded to 192, as the
# published 4,304 is to 4,352.
SIZES: dict[str, Any] = {"inter": 192, "v_inter": 144, "layers": 8}


# Sizes of which mlx-vlm counts the tokens as the reference does; of others it does not, and stops.
PICTURES = [(56, 56), (337, 511), (333, 334), (112, 168)]


@pytest.mark.parametrize(
    ("recipe", "tied"),
    [
        (None, True),
        (recipes.uniform(4), False),
        (recipes.uniform(8), True),
        (recipes.mixed("mixed_3_6"), False),
        (recipes.uniform(mode="mxfp4"), True),
        (recipes.uniform(6, vision_bits=None), False),
    ],
    ids=["unquantised", "4-bit", "8-bit", "mixed", "mxfp4", "6-bit, tower as it is"],
)
def test_mlx_vlm_answers_the_same(
    checkpoints: Checkpoints, tmp_path: Path, recipe: recipes.Recipe | None, tied: bool
) -> None:
    source = checkpoints.hub(Tiny(tied=tied, **SIZES))
    facts = convert(source, tmp_path / "converted", recipe=recipe)
    assert facts.padded == (192 if recipe is not None and recipe.vision else None)
    assert facts.skipped == ()
    assert_same_answers(facts.target, tmp_path)


@pytest.mark.parametrize("layout", [to_lmms_lab, to_transformers_4_52, to_sharded])
def test_of_every_layout(
    checkpoints: Checkpoints, tmp_path: Path, layout: Callable[[Path, Path], Path]
) -> None:
    source = layout(checkpoints.hub(Tiny(**SIZES)), tmp_path / "source")
    if layout is to_lmms_lab:  # the published ones have no template, and are asked by another one
        (source / "chat_template.json").unlink()
    target = convert(source, tmp_path / "converted", recipe=recipes.uniform()).target
    assert_same_answers(target, tmp_path)


def assert_same_answers(folder: Path, scratch: Path) -> None:
    """mlx-vlm makes of every picture the ids and the greedy tokens that this package makes."""
    ours = Ours(folder)
    pictures, prompts, expected = [], [], []
    for number, size in enumerate(PICTURES):
        messages = ask(picture(size))
        pictures.append(scratch / f"{number}.png")
        picture(size).save(pictures[-1])
        prompts.append(ours.model.render(messages))
        ids = ours.model.prepare(messages).input_ids.tolist()
        expected.append({"ids": ids, "tokens": ours.tokens(messages, TOKENS)})
    ours.close()
    theirs = ask_mlx_vlm(folder, prompts, pictures, TOKENS)
    for answer, wanted in zip(theirs, expected, strict=True):
        assert answer["ids"] == wanted["ids"]
        assert answer["tokens"][: len(wanted["tokens"])] == wanted["tokens"]
