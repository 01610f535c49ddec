"""What is kept with vectors, that spaces do not mix, and the cache, progress and errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_checkpoints import quantize
from checkpoints import write
from images import noise

from mlx_onevision.api import Model, load
from mlx_onevision.embed.embedder import GROUP
from mlx_onevision.embed.embeddings import Embeddings
from mlx_onevision.errors import ContextOverflowError, MediaError, OneVisionError, RequestError


def picture(seed: int, height: int = 60, width: int = 90) -> np.ndarray:
    return noise(height, width, 3, seed=seed)


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


# Provenance.


def test_what_is_kept_with_every_vector(model: Model) -> None:
    vision, joint = model.embed([picture(0)]), model.embed([text("a star")], "joint")
    assert not vision.experimental and joint.experimental
    assert "cannot be compared with any text" in vision.note
    assert "Experimental" in joint.note
    assert vision.provenance == {
        "space": "vision",
        "dim": 64,
        "normalized": True,
        "model": "tiny",
        "revision": vision.revision,
        "quantization": None,
        "method": "mean of tower features [2] over the 28x28 base view, 32 frames a video",
    }
    assert len(vision.revision) == 40
    assert json.loads(json.dumps(vision.to_dict()))["vectors"][0] == vision.vectors[0].tolist()


def test_another_model_has_another_revision(folder: Path, model: Model, tmp_path: Path) -> None:
    """The same network elsewhere has the same; one that was trained on has not."""
    copy = load(write(tmp_path / "copy", tied=False))
    other = load(write(tmp_path / "other", tied=False, seed=1))
    ours, theirs = model.embed([picture(0)]), other.embed([picture(0)])
    assert copy.embed([picture(0)]).similarity(ours)[0, 0] == pytest.approx(1, abs=1e-6)
    with pytest.raises(RequestError, match=r"revision .tiny at .* and other at"):
        ours.similarity(theirs)
    with pytest.raises(RequestError, match="revision"):
        Embeddings.concatenate([ours, theirs])
    copy.close()
    other.close()


def test_a_model_of_the_hub_is_its_repository_and_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--llava-hf--llava-onevision" / "snapshots" / commit
    hub = load(write(folder))
    embeddings = hub.embed([])
    hub.close()
    assert (embeddings.model, embeddings.revision) == ("llava-hf/llava-onevision", commit)
    assert embeddings.vectors.shape == (0, 64) and len(embeddings) == 0


def test_quantization_is_said_and_leaves_an_unpacked_tower_alone(tmp_path: Path) -> None:
    plain = load(write(tmp_path / "plain", "mlx-vlm"))
    packed = load(quantize(tmp_path / "plain", tmp_path / "packed", bits=4, group_size=64))
    one, other = plain.embed([picture(0)]), packed.embed([picture(0)])
    assert one.quantization is None
    assert other.quantization == "4 bits in groups of 64 (affine)"
    np.testing.assert_array_equal(one.vectors, other.vectors)
    with pytest.raises(RequestError, match="embed both with one model"):
        one.similarity(other)
    plain.close()
    packed.close()


def test_spaces_do_not_mix(model: Model) -> None:
    vision, joint = model.embed([picture(0)]), model.embed([picture(0)], "joint")
    for mix in (lambda: vision.similarity(joint), lambda: Embeddings.concatenate([vision, joint])):
        with pytest.raises(RequestError) as refused:
            mix()
        assert str(refused.value) == (
            "these embeddings have different space (vision and joint) and cannot be compared; "
            "embed both in one space"
        )
    raw = model.embed([picture(0)], normalize=False)
    assert vision.similarity(raw)[0, 0] == pytest.approx(1, abs=1e-6)
    with pytest.raises(RequestError, match="normalized"):
        Embeddings.concatenate([vision, raw])
    with pytest.raises(RequestError):
        Embeddings.concatenate([])


def test_they_join_and_survive_a_file(model: Model, tmp_path: Path) -> None:
    parts = [model.embed([picture(0), picture(1)]), model.embed([picture(2)])]
    whole = Embeddings.concatenate(parts)
    assert len(whole) == 3 and whole.names == ("item 1", "item 2", "item 1")
    whole.save(tmp_path / "vectors.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npz"]
    again = Embeddings.load(tmp_path / "vectors.npz")
    np.testing.assert_array_equal(again.vectors, whole.vectors)
    assert again.provenance == whole.provenance and again.names == whole.names
    for content in (b"", b"PK", b"\x80\x04N."):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(RequestError, match="does not hold embeddings"):
            Embeddings.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", vectors=whole.vectors)
    with pytest.raises(RequestError, match="does not hold embeddings"):
        Embeddings.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        Embeddings.load(tmp_path / "none.npz")


# The cache, progress and errors.


def test_a_cache_is_asked_by_content(model: Model) -> None:
    cache: dict[str, np.ndarray] = {}
    first = model.embed([picture(0), picture(1), picture(0)], cache=cache)
    assert len(cache) == 2
    np.testing.assert_array_equal(first.vectors[0], first.vectors[2])
    cache[next(iter(cache))] = np.eye(64, dtype=np.float32)[3]
    again = model.embed([picture(0), picture(2)], cache=cache)
    assert again.vectors[0].argmax() == 3 and len(cache) == 3
    model.embed([picture(0), text("a star")], "joint", cache=cache)
    assert len(cache) == 5
    model.embed([picture(0)], "joint", tiling="never", cache=cache)
    assert len(cache) == 6


def test_progress_counts_items(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    model.embed([picture(0)] * (GROUP + 2), progress=lambda *counts: seen.append(counts))
    assert seen == [(GROUP, GROUP + 2), (GROUP + 2, GROUP + 2)]


def test_errors_name_the_item(model: Model, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(MediaError, match=r"^item 2: .*bad\.png"):
        model.embed([picture(0), bad])
    failed: dict[int, str] = {}
    rest = model.embed(
        [bad, picture(0), "nope.png", picture(1)],
        on_error=lambda index, error: failed.update({index: str(error)}),
    )
    assert rest.names == ("item 2", "item 4") and len(rest) == 2
    assert sorted(failed) == [0, 2] and failed[2].startswith("item 3: 'nope.png'")


@pytest.mark.parametrize(
    ("items", "space", "said"),
    [
        ([text("a star")], "vision", "no place for text"),
        ([[picture(0), picture(1)]], "vision", "one image or video an item, not 2"),
        ([[picture(0), text("a star")]], "joint", "one kind"),
        ([[]], "joint", "item 1: it is an empty list"),
        ([text(" ")], "joint", "item 1"),
        ([None], "vision", "item 1"),
        ([{"type": "sound"}], "joint", "item 1: .*sound"),
        ([picture(0)], "words", "vision or joint"),
        ("a.png", "vision", "items is one str"),
        (picture(0), "vision", "items is one ndarray"),
    ],
)
def test_what_cannot_be_embedded(model: Model, items: Any, space: str, said: str) -> None:
    with pytest.raises(OneVisionError, match=said) as refused:
        model.embed(items, space)
    assert "\n" not in str(refused.value)


def test_a_text_beyond_the_context(model: Model) -> None:
    with pytest.raises(ContextOverflowError, match="item 2: it takes"):
        model.embed([text("a star"), text("a b " * 40_000)], "joint")


def test_a_closed_model_says_so(folder: Path) -> None:
    closed = load(folder)
    closed.close()
    with pytest.raises(OneVisionError, match="closed"):
        closed.embed([picture(0)])


def test_an_answer_after_an_embedding_is_the_same(folder: Path, model: Model) -> None:
    def answer(of: Model) -> tuple[int, ...]:
        return of.generate("what is it", images=[picture(0)], max_tokens=6).tokens

    fresh = load(folder)
    assert answer(fresh) == answer(model)
    fresh.close()
