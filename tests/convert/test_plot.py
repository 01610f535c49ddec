"""Losses as pictures: what is drawn where, in both themes, and what is said when it cannot be."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_onevision.convert.loss.metrics import DivergenceStats, LayerLoss, Loss
from mlx_onevision.convert.loss.plot import COLOURS, THEMES, Theme, plot, plot_compare
from mlx_onevision.errors import RequestError
from mlx_onevision.network.memory_sizes import Footprint

ERRORS = [("tower", n, 0.002 * 1.5**n) for n in range(4)]
ERRORS += [("projector", 0, 0.01)]
ERRORS += [("language", n, 0.05 * 1.2**n) for n in range(6)]


def loss(size: int = 10**9, kl: float = 1e-2, scale: float = 1.0) -> Loss:
    stats = DivergenceStats("all", 100, kl, 2 * kl, 3 * kl, 0.98)
    return Loss(
        source="source",
        result="result",
        dtype="float32",
        version=1,
        all=stats,
        conversations=stats,
        texts=None,
        tower_cosine_mean=0.999,
        tower_cosine_min=0.99,
        source_perplexity=None,
        result_perplexity=None,
        bits_per_weight=4.5,
        weights_bytes=size,
        source_weights_bytes=4 * size,
        disk_bytes=size,
        memory=Footprint(7000, size, size, size, size),
        layers=tuple(LayerLoss(part, n, scale * e) for part, n, e in ERRORS),  # type: ignore[arg-type]
        probes=(),
    )


def places(path: Path, colour: str, least: int = 4) -> np.ndarray:
    """Where in a picture the pixels of exactly this colour are: (n, 2), row and column."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    found = np.argwhere((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1))
    assert len(found) >= least, colour
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_layers(tmp_path: Path, theme: Theme) -> None:
    path = tmp_path / "loss.png"
    plot(loss(), path, theme)
    picture = np.asarray(Image.open(path).convert("RGB"))
    height, width = picture.shape[:2]
    assert (height, width) == (660, 1080)
    ground = [int(THEMES[theme]["ground"][i : i + 2], 16) for i in (1, 3, 5)]
    assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == ground).all()
    places(path, THEMES[theme]["ink"], 500)  # axes and words can be seen on this ground
    # The legend is at the upper left; the lines begin below it.
    lines = {part: places(path, colour) for part, colour in COLOURS[theme].items()}
    lines = {part: at[at[:, 0] > 150] if part != "language" else at for part, at in lines.items()}
    left = [np.median(lines[part][:, 1]) for part in ("tower", "projector", "language")]
    assert left == sorted(left)
    # A larger error is higher up.
    tower = lines["tower"]
    assert tower[tower[:, 1].argmin(), 0] > tower[tower[:, 1].argmax(), 0]


def test_no_loss_at_all_can_be_drawn(tmp_path: Path) -> None:
    plot(loss(scale=0), tmp_path / "loss.png")
    plot_compare([("itself", loss(kl=0))], tmp_path / "compare.png")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_curve_of_sizes(tmp_path: Path, theme: Theme) -> None:
    """A recipe that is larger and worse than another is marked, and not on the line."""
    path = tmp_path / "compare.png"
    losses = [("8", loss(8 * 10**9, 1e-4)), ("2", loss(2 * 10**9, 1.0)), ("4", loss(4 * 10**9))]
    plot_compare(losses, path, theme)
    colour, other = COLOURS[theme]["tower"], COLOURS[theme]["projector"]
    line = places(path, colour, 200)
    line = line[line[:, 1] < 560]  # left of the legend
    assert line[line[:, 1].argmin(), 0] < line[line[:, 1].argmax(), 0]
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert not (picture == [int(other[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any()
    plot_compare([*losses, ("odd", loss(6 * 10**9, 0.5))], path, theme)
    places(path, other, 20)


def test_kinds_of_files(tmp_path: Path) -> None:
    for name in ("a.svg", "b.pdf", "c.PNG"):
        plot(loss(), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(RequestError, match=r"a\.gif is no name for a plot; it ends in \.png"):
        plot(loss(), tmp_path / "a.gif")
    with pytest.raises(RequestError, match="cannot be written"):
        plot(loss(), tmp_path / "nowhere" / "a.png")
    with pytest.raises(RequestError, match="no losses"):
        plot_compare([], tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_a_prepared_link_is_not_written_through(tmp_path: Path) -> None:
    """Whoever may write into the folder cannot guess where the picture is drawn."""
    other, link = tmp_path / "other", tmp_path / ".loss.drawing.png"
    other.write_text("kept")
    link.symlink_to(other)
    plot(loss(), tmp_path / "loss.png")
    assert other.read_text() == "kept" and link.is_symlink()
    assert not (tmp_path / "loss.png").is_symlink()
    assert len(list(tmp_path.iterdir())) == 3


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RequestError, match=r"pip install 'mlx-onevision\[plot\]'"):
        plot(loss(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
