"""One network in every file layout: the same tensors, names and settings written differently."""

from pathlib import Path

import pytest
from parity import layouts, saved
from parity.cases import FEW, ask, picture
from parity.checkpoints import Tiny
from parity.compare import assert_same
from parity.oracle import Oracle
from parity.ours import Ours
from parity.pairs import Checkpoints

LAYOUTS = layouts.LAYOUTS | {
    "transformers-5": saved.by_transformers,
    "hub-saved-by-transformers-5": saved.resaved_by_transformers,
}
UNREADABLE = ("lmms-lab",)  # by the reference: it is asked about the Hub twin of the same network


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(checkpoints: Checkpoints, tmp_path: Path, name: str, tied: bool) -> None:
    hub = checkpoints.hub(Tiny(tied=tied))
    folder = LAYOUTS[name](hub, tmp_path / name)
    ours = Ours(folder)
    oracle = Oracle(hub if name in UNREADABLE else folder)
    for size in FEW:
        assert_same(ours, oracle, ask(picture(size)), tokens=32)
    ours.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_half_precision_files_in_float32(
    checkpoints: Checkpoints, tmp_path: Path, tied: bool
) -> None:
    """The published files are float16; computing them in float32 is exact on both sides."""
    folder = layouts.to_half(checkpoints.hub(Tiny(tied=tied)), tmp_path / "half")
    ours, oracle = Ours(folder, dtype="float32"), Oracle(folder)
    for size in FEW:
        assert_same(ours, oracle, ask(picture(size)), tokens=32)
    ours.close()


@pytest.mark.parametrize("copy", [True, False], ids=["a copy", "its own"])
def test_head_in_a_tied_file(checkpoints: Checkpoints, tmp_path: Path, copy: bool) -> None:
    """A head that the file holds counts, even where the configuration ties it to the embedding."""
    folder = layouts.with_head(checkpoints.hub(Tiny()), tmp_path / "head", copy=copy)
    ours, oracle = Ours(folder), Oracle(folder)
    for size in FEW[:4]:
        assert_same(ours, oracle, ask(picture(size)), tokens=32)
    ours.close()
