"""A full disk under everything that is written: what was there stays, nothing half is left, and a
sentence says why. Conversions: tests/convert/test_safety.py; training: tests/train/test_loop.py.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile.disk import contents, full, offsets, refusal

from mlx_onevision.api import Model, load
from mlx_onevision.files import save
from mlx_onevision.plugins.hosts.llm import registry

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
VIDEO = Path(__file__).parents[2] / "examples/circle.mp4"

WRITERS: dict[str, Callable[[Model, Path], None]] = {
    "text": lambda model, path: save(path, "subtitles " * 1000),
    "vectors": lambda model, path: model.embed([PHOTO]).save(path),
    "prompt cache": lambda model, path: model.save_prompt_cache(path),
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load("demo") as model:
        model.generate("what is this", images=[PHOTO], max_tokens=2)
        yield model


@pytest.mark.parametrize("older", [True, False], ids=["over an older file", "a new file"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_there_stays(model: Model, tmp_path: Path, kind: str, older: bool) -> None:
    write, path = WRITERS[kind], tmp_path / "file.npz"
    write(model, path)
    size = path.stat().st_size
    before = contents(tmp_path)
    if not older:
        path.unlink()
        before = {}
    for offset in offsets(size):
        with full(offset), pytest.raises(OSError) as raised:
            write(model, path)
        assert refusal(raised.value).startswith(f"{path}: ")
        assert contents(tmp_path) == before
    write(model, path)
    assert path.stat().st_size == size


def test_the_models_of_llm_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    registry.save([registry.Entry("one", "demo")])
    before = contents(tmp_path)
    for offset in offsets(len(next(iter(before.values())))):
        with full(offset), pytest.raises(OSError) as raised:
            registry.save([registry.Entry(name, "demo") for name in ("one", "two")])
        refusal(raised.value)
        assert contents(tmp_path) == before


def test_a_description_goes_on_where_the_disk_was_full(model: Model, tmp_path: Path) -> None:
    record = tmp_path / "record"

    def describe() -> str:
        described = model.describe_video(VIDEO, sidecar=record, max_tokens=4)
        return json.dumps([segment.to_dict() for segment in described.segments])

    text = describe()
    size = record.stat().st_size
    for offset in offsets(size):
        record.unlink()
        with full(offset), pytest.raises(OSError) as raised:
            describe()
        refusal(raised.value)
        assert describe() == text
