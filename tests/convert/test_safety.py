"""Never half a model: killed conversions, full disks, broken disks, two converters at once."""

import errno
import hashlib
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from changed_checkpoints import edit
from checkpoints import Sizes, write
from commands import Killer
from hostile.sizes import cases

from mlx_onevision.checkpoint import recipes
from mlx_onevision.checkpoint.load import load_checkpoint
from mlx_onevision.convert import conversion, staging, writer
from mlx_onevision.convert.conversion import convert
from mlx_onevision.errors import OneVisionError, RequestError, StorageError

SIZES = Sizes(vision_layers=1, layers=1)
KILLS = cases(10, 100)
OLD, NEW = recipes.uniform(8), recipes.uniform(4)


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as server:
        yield server


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: what is flushed a thousand times here need not wait
    for a disk.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, an older model of it and what the killed runs would make, all called ``it``."""
    root = tmp_path_factory.mktemp("made")
    source = write(root / "source", sizes=SIZES)
    for name, recipe in (("old", OLD), ("new", NEW)):
        (root / name).mkdir()
        convert(source, root / name / "it", recipe=recipe, shard_bytes=250_000)
    return source, root / "old" / "it", root / "new" / "it"


def digest(folder: Path) -> str:
    """One hash of all files of a folder and their names, the card left out: it names the folder."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "README.md" and "manifest" not in path.name:
            whole.update(f"{path.name} ".encode() + path.read_bytes())
    return whole.hexdigest()


def temporary(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if staging.TEMPORARY.fullmatch(p.name)]


def loads(folder: Path) -> bool:
    try:
        load_checkpoint(folder)
    except OneVisionError:
        return False
    return True


class Place:
    """A folder in which conversions are killed, and what may be found in it afterwards."""

    def __init__(self, parent: Path, made: tuple[Path, Path, Path]) -> None:
        self.source, self.old, self.new = made
        self.parent = parent
        self.target = parent / "it"
        self.whole = {digest(self.old): "old", digest(self.new): "new"}

    def begin(self, older: bool) -> None:
        for path in self.parent.iterdir():
            shutil.rmtree(path)
        if older:
            shutil.copytree(self.old, self.target)

    def found(self) -> str:
        """ "old", "new" or "none"; fails for half a model, wherever it lies."""
        for path in self.parent.iterdir():
            kind = self.whole.get(digest(path))
            assert kind or (path != self.target and not loads(path)), path
        if not self.target.exists():
            return "none"
        assert loads(self.target)
        return self.whole[digest(self.target)]

    def next_run(self) -> str:
        """What is found after another run, which is refused or not but always cleans up."""
        staging.remove_leftovers(self.parent)
        assert temporary(self.parent) == []
        return self.found()


@pytest.mark.parametrize("older", [True, False], ids=["over an older model", "into nothing"])
def test_killed_at_random_moments(
    tmp_path: Path, killer: Killer, made: tuple[Path, Path, Path], older: bool
) -> None:
    """Runs that ended before their moment are not counted."""
    place, rng = Place(tmp_path, made), random.Random(older)
    place.begin(older)
    begun = time.perf_counter()
    killer.run(place.source, place.target, overwrite=True)
    whole = time.perf_counter() - begun
    place.begin(older)
    killed = 0
    while killed < KILLS:
        moment = rng.uniform(0, whole)
        said = killer.run(place.source, place.target, overwrite=True, after=moment)
        whole = whole if said["killed"] else moment  # it is faster than it was at first
        killed += said["killed"]
        found = place.found()
        assert found in (("old", "new") if older else ("none", "new")), said
        if found == "new" or rng.random() < 0.3:
            place.begin(older)  # otherwise the leftovers are met by the next run
    place.next_run()


def test_killed_at_every_step(
    tmp_path: Path, killer: Killer, made: tuple[Path, Path, Path]
) -> None:
    place = Place(tmp_path, made)
    place.begin(older=True)
    steps = killer.run(place.source, place.target, overwrite=True)["steps"]
    assert steps > 40 and place.next_run() == "new"
    ends = []
    for step in range(1, steps + 1):
        place.begin(older=True)
        said = killer.run(place.source, place.target, overwrite=True, step=step)
        assert said["killed"]
        ends.append(place.found())
        assert place.next_run() == ends[-1]
    swapped = ends.index("new")
    assert ends == ["old"] * swapped + ["new"] * (steps - swapped)


def test_killed_where_folders_cannot_be_swapped(
    tmp_path: Path, killer: Killer, made: tuple[Path, Path, Path]
) -> None:
    """Between two renames the name is nobody's; the next run puts the old model back."""
    place = Place(tmp_path, made)
    place.begin(older=True)
    whole = killer.run(place.source, place.target, overwrite=True, no_exchange=True)["steps"]
    assert place.found() == "new"
    ends = []
    for step in range(whole - 24, whole - 15):
        place.begin(older=True)
        killer.run(place.source, place.target, overwrite=True, no_exchange=True, step=step)
        ends.append((place.found(), place.next_run()))
    assert set(ends) == {("old", "old"), ("none", "old"), ("new", "new")}


def test_a_real_limit_on_files(
    tmp_path: Path, killer: Killer, made: tuple[Path, Path, Path]
) -> None:
    """The system itself refuses to write on (EFBIG), in the middle of a file."""
    place = Place(tmp_path, made)
    place.begin(older=True)
    for limit in (0, 1, 4096, 30_000, 60_000, 90_000):
        said = killer.run(place.source, place.target, overwrite=True, limit=limit)
        assert "cannot be written: File too large" in said["error"]
        assert place.found() == "old" and temporary(tmp_path) == []


class Failing:
    """A file that takes so many bytes in all, with its fellows, and then raises."""

    def __init__(self, file: BinaryIO, left: list[int], number: int) -> None:
        self._file, self._left, self._number = file, left, number

    def write(self, data: memoryview) -> int:
        if not self._left[0]:
            raise OSError(self._number, os.strerror(self._number))
        count = self._file.write(data[: self._left[0]])  # as a disk that fills up: a part first
        self._left[0] -= count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_disk_that_fails(
    tmp_path: Path,
    made: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """At 20 offsets, spread over all that is written: one sentence, and all is as it was."""
    place = Place(tmp_path, made)
    before = digest(place.source)
    total = sum(path.stat().st_size for path in place.new.iterdir())
    open_new = writer.open_new
    place.begin(older=True)
    for n in range(20):
        left = [total * n // 20]
        monkeypatch.setattr(
            writer, "open_new", lambda path, left=left: Failing(open_new(path), left, number)
        )
        with pytest.raises(StorageError) as refused:
            convert(place.source, place.target, recipe=NEW, overwrite=True, shard_bytes=250_000)
        assert os.strerror(number) in str(refused.value) and "\n" not in str(refused.value)
        assert place.found() == "old" and temporary(tmp_path) == []
    assert digest(place.source) == before


def test_a_disk_that_does_not_flush(
    tmp_path: Path, made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, made)
    place.begin(older=True)
    flush, calls = writer.flush, 0

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flush(descriptor)

    monkeypatch.setattr(writer, "flush", failing)
    with pytest.raises(StorageError, match="Input/output error"):
        convert(place.source, place.target, recipe=NEW, overwrite=True)
    assert place.found() == "old" and temporary(tmp_path) == []


def test_too_little_room_is_seen_first(
    tmp_path: Path, made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"are needed in .* and 1.5 MB are free"):
        convert(made[0], tmp_path / "it")
    assert list(tmp_path.iterdir()) == []
    usage = usage._replace(free=1_700_000)
    convert(made[0], tmp_path / "it")


def test_what_was_written_is_read_back(
    tmp_path: Path, made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that changes on its way to the disk is found before the older model is gone."""
    place = Place(tmp_path, made)
    place.begin(older=True)
    check = conversion.check

    def spoiled(folder: Path, *rest: Any) -> None:
        path = next(folder.glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        check(folder, *rest)

    monkeypatch.setattr(conversion, "check", spoiled)
    with pytest.raises(OneVisionError, match="does not hold what was written"):
        convert(place.source, place.target, recipe=NEW, overwrite=True)
    assert place.found() == "old" and temporary(tmp_path) == []


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    for part in (0.2, 0.5, 0.9):  # while it is written, and while it is read back

        def progress(done: int, total: int, part: float = part) -> None:
            if done > total * part:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(made[0], tmp_path / "it", progress=progress)
        assert list(tmp_path.iterdir()) == []
    seen: list[tuple[int, int]] = []
    convert(made[0], tmp_path / "it", progress=lambda *now: seen.append(now))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_two_at_once(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    """One wins, the other says so, and neither takes the other's half for a leftover."""
    place = Place(tmp_path, made)
    for _ in range(5):
        place.begin(older=False)
        meeting, ends = threading.Barrier(2), []

        def measure(_: Path, __: Path, meeting: threading.Barrier = meeting) -> str:
            meeting.wait(10)  # both have written everything and checked nothing
            return ""

        def run(ends: list[str] = ends, measure: Any = measure) -> None:
            try:
                convert(
                    place.source, place.target, recipe=NEW, measure=measure, shard_bytes=250_000
                )
                ends.append("won")
            except RequestError as error:
                ends.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lost, won = sorted(ends, key=lambda end: end == "won")
        assert won == "won" and "is there already" in lost
        assert place.found() == "new" and temporary(tmp_path) == []


def test_a_model_that_came_meanwhile_is_not_replaced(
    tmp_path: Path, made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at the target and the rename."""
    place = Place(tmp_path, made)
    look, looks = staging.require_target, 0

    def required(target: Path, overwrite: bool) -> Path:
        nonlocal looks
        looks += 1
        found = look(target, overwrite)
        if looks == 2:
            shutil.copytree(place.old, place.target)
        return found

    with staging.Staging(place.target) as new:
        shutil.copytree(place.new, new.path, dirs_exist_ok=True)
        monkeypatch.setattr(staging, "require_target", required)
        looks = 1
        with pytest.raises(RequestError, match="is there already"):
            new.publish()
    monkeypatch.undo()
    assert digest(place.target) == digest(place.old)


def test_a_run_at_work_is_left_alone(tmp_path: Path) -> None:
    with staging.Staging(tmp_path / "it") as one:
        (one.path / "half").write_text("")
        staging.remove_leftovers(tmp_path)
        assert (one.path / "half").exists()
        (tmp_path / ".other.mlx-onevision-0123abcd").mkdir()
        (tmp_path / ".other.mlx-onevision-nothexa1").mkdir()
        staging.remove_leftovers(tmp_path)
        assert (one.path / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".other.mlx-onevision-nothexa1"]


def test_a_file_system_without_locks(
    tmp_path: Path, made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversion goes on; nobody can know then which leftovers are somebody's, so all stay."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(staging, "exchange", lambda *_: False)
    place = Place(tmp_path, made)
    place.begin(older=True)
    (tmp_path / ".other.mlx-onevision-0123abcd").mkdir()
    convert(place.source, place.target, recipe=NEW, overwrite=True, shard_bytes=250_000)
    assert digest(place.target) == digest(place.new)
    assert temporary(tmp_path) == [".other.mlx-onevision-0123abcd"]


def test_what_a_source_lacks_is_seen_first(tmp_path: Path) -> None:
    source = write(tmp_path / "source", sizes=SIZES)
    (source / "tokenizer.json").unlink()
    with pytest.raises(OneVisionError, match=r"neither a tokenizer\.json nor"):
        convert(source, tmp_path / "it", progress=lambda *_: pytest.fail("it wrote weights"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_only_a_model_is_overwritten(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    place = Place(tmp_path, made)
    place.begin(older=True)
    (place.target / "notes.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds notes.txt, so it is not only a model"):
        convert(place.source, place.target, overwrite=True)
    (place.target / "notes.txt").rename(tmp_path / "notes.txt")
    (place.target / "config.json").unlink()
    with pytest.raises(RequestError, match=r"holds no config.json"):
        convert(place.source, place.target, overwrite=True)
    with pytest.raises(RequestError, match="is a file"):
        convert(place.source, tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert loads(convert(place.source, tmp_path / "empty").target)


def test_a_link_is_followed(tmp_path: Path, made: tuple[Path, Path, Path]) -> None:
    place = Place(tmp_path, made)
    place.begin(older=True)
    (tmp_path / "link").symlink_to(place.target)
    convert(place.source, tmp_path / "link", recipe=NEW, overwrite=True, shard_bytes=250_000)
    assert (tmp_path / "link").is_symlink()
    assert digest(place.target) == digest(place.new)


def test_a_folder_that_may_not_be_written(
    tmp_path: Path, made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", mkdir)  # root may write anywhere
    with pytest.raises(StorageError, match="Permission denied"):
        convert(made[0], tmp_path / "it")


def test_a_source_that_changes(tmp_path: Path) -> None:
    source = write(tmp_path / "source", sizes=SIZES)
    planned = conversion.prepare(conversion.find(source), tmp_path / "it")
    write(source, sizes=Sizes(vision_layers=1, layers=1, hidden=128, heads=8))
    with pytest.raises(OneVisionError):
        conversion.write(planned)
    edit(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
