"""Tiles kept by the contents that they were made of."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from images import noise

from mlx_onevision.errors import CancelledError
from mlx_onevision.media import cache as module
from mlx_onevision.media import parallel
from mlx_onevision.media.cache import TileCache, array_key, digest_of, file_key
from mlx_onevision.media.decoder import no_check


@dataclass
class Thing:
    tiles: np.ndarray


def thing(size: int) -> Thing:
    return Thing(np.zeros(size, np.uint8))


def test_what_was_used_last_is_kept() -> None:
    cache = TileCache(100)
    kept = [thing(40), thing(40)]
    cache.put("a", kept[0])
    cache.put("b", kept[1])
    assert cache.get("a", Thing) is kept[0] and cache.nbytes == 80
    cache.put("c", thing(40))
    assert cache.get("b", Thing) is None
    assert cache.get("a", Thing) is kept[0] and cache.nbytes == 80


def test_what_is_larger_than_all_is_not_kept_and_drives_nothing_out() -> None:
    cache = TileCache(100)
    cache.put("a", thing(100))
    cache.put("b", thing(101))
    assert cache.get("a", Thing) is not None and cache.get("b", Thing) is None


def test_nothing_is_kept_without_a_key() -> None:
    cache = TileCache(100)
    cache.put(None, thing(1))
    assert cache.get(None, Thing) is None and cache.nbytes == 0


def test_the_same_key_counts_once() -> None:
    cache = TileCache(100)
    for _ in range(5):
        cache.put("a", thing(60))
    assert cache.nbytes == 60


def test_kept_tiles_cannot_be_changed() -> None:
    one = thing(4)
    TileCache(100).put("a", one)
    with pytest.raises(ValueError, match="read-only"):
        one.tiles[0] = 1


def test_arrays_of_the_same_bytes_differ_by_shape_and_type() -> None:
    zeros = np.zeros((2, 6), np.uint8)
    keys = [array_key(a) for a in (zeros, zeros.T, zeros.view(np.int8), zeros.reshape(3, 4))]
    assert len(set(keys)) == 4
    turned = np.arange(12, dtype=np.uint8).reshape(3, 4).T
    assert array_key(turned) == array_key(turned.copy())
    assert array_key(np.array([object()])) is None


def test_every_piece_of_an_array_counts_and_so_does_its_place() -> None:
    """Pieces are hashed on several cores."""
    levels = noise(1200, 1000, 3)
    found = {digest_of(levels), digest_of(levels[:-1]), digest_of(np.roll(levels, module._PIECE))}
    for place in range(0, levels.size, module._PIECE):
        other = levels.copy()
        other.reshape(-1)[[place - 1, place]] ^= 1
        found.add(digest_of(other))
    assert len(found) == 3 + math.ceil(levels.size / module._PIECE)
    assert digest_of(levels) == digest_of(levels[:, ::-1][:, ::-1])
    assert digest_of(levels[:0]) != digest_of(levels[:1])


def test_one_core_and_several_make_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, seen = noise(1200, 1000, 3), set()
    for count in (1, 3):
        monkeypatch.setattr(parallel, "cores", lambda count=count: count)
        parallel._pool.cache_clear()
        seen.add(digest_of(levels))
    parallel._pool.cache_clear()
    assert len(seen) == 1


def test_files_are_told_apart_by_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3)
    path, keys = tmp_path / "file", []
    for data in (b"some bytes", b"some bytes", b"some bytez", b"some byte"):
        path.write_bytes(data)
        os.utime(path, (1, 1))
        with path.open("rb") as file:
            file.seek(2)
            keys.append(file_key(file, no_check))
            assert file.tell() == 2
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_large_file_is_not_hashed(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb+") as file:
        file.truncate(module.MAX_HASHED + 1)
        assert file_key(file, no_check) is None


def test_hashing_can_be_cancelled(tmp_path: Path) -> None:
    def check() -> None:
        raise CancelledError("enough")

    (tmp_path / "file").write_bytes(b"bytes")
    with (tmp_path / "file").open("rb") as file, pytest.raises(CancelledError):
        file_key(file, check)
