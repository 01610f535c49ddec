"""Uploads on disk: bounded together, private, and gone with their process, however it ends."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile.disk import contents, full

from mlx_onevision.plugins.contract.errors import PluginError
from mlx_onevision.plugins.service import spool as module
from mlx_onevision.plugins.service.spool import Spool

VIDEO = b"\0\0\0\x18ftypmp42" + bytes(100)


def spool(
    parent: Path, *, largest: int = 1000, room: int = 3000, most: int = 64, kept: float = 900.0
) -> Spool:
    return Spool(
        parent, max_file_bytes=largest, max_total_bytes=room, max_files=most, retention_seconds=kept
    )


def send(to: Spool, data: bytes = VIDEO) -> str:
    with to.receive() as receiver:
        receiver.write(data)
        receiver.finish()
    return receiver.upload.id


def refused(to: Spool, data: bytes = VIDEO) -> PluginError:
    with pytest.raises(PluginError) as raised:
        send(to, data)
    assert "; " in str(raised.value) and str(to._parent) not in str(raised.value)
    return raised.value


def test_a_file_is_read_as_it_was_sent(tmp_path: Path) -> None:
    one = spool(tmp_path)
    with one.receive() as receiver:
        for piece in (VIDEO[:5], VIDEO[5:40], VIDEO[40:]):  # its kind shows after 32 bytes
            receiver.write(piece)
        receiver.finish()
    id = receiver.upload.id
    assert (one.upload(id).kind, one.upload(id).size) == ("video", len(VIDEO))
    with one.open(id) as file, one.open(id) as other:
        assert file.read() == other.read() == VIDEO and str(tmp_path) not in str(file.name)
    one.delete(id)
    with pytest.raises(PluginError, match="is not here, or not any more; send the file again"):
        one.open(id)
    assert set(contents(tmp_path).values()) == {b""}  # the locks


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        one = spool(tmp_path / "uploads")
        id = send(one)
    finally:
        os.umask(before)
    (file,) = tmp_path.rglob(id)
    assert file.stat().st_mode & 0o777 == 0o600
    for folder in (file.parent, file.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_what_is_not_whole_is_deleted(tmp_path: Path) -> None:
    one = spool(tmp_path)
    with pytest.raises(KeyError), one.receive() as receiver:
        receiver.write(VIDEO)
        with pytest.raises(PluginError):  # nobody can name it yet
            one.upload(receiver.upload.id)
        raise KeyError
    assert set(contents(tmp_path).values()) == {b""}
    assert refused(one, b"neither of them, at some length: " * 3).code == "unsupported_media"
    assert refused(one, b"short").code == "unsupported_media"
    assert set(contents(tmp_path).values()) == {b""}


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = spool(tmp_path, largest=1 << 20, room=3 << 20, most=4)
    large = VIDEO + bytes(900_000)
    error = refused(one, VIDEO + bytes(1 << 20))
    assert error.code == "too_large" and "more than 1 MB" in error.message
    ids = [send(one, large) for _ in range(3)]
    assert refused(one, large).code == "busy"
    ids.append(send(one))  # there is room for this
    assert refused(one).code == "busy"  # but no fifth place
    # What nobody has asked about for a while makes room, the oldest first, unless it is in use.
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.0)
    one.upload(ids[1])
    with one.using(ids[0]):
        send(one, large)
        with pytest.raises(PluginError):
            one.upload(ids[2])
        one.upload(ids[0])
    sizes = sum(len(data) for data in contents(tmp_path).values())
    assert sizes <= 3 << 20


def test_what_is_not_asked_about_is_deleted(tmp_path: Path) -> None:
    one = spool(tmp_path, kept=0.3)
    held, other = send(one), send(one)
    with one.using(held):
        until = time.monotonic() + 10
        while list(tmp_path.rglob(other)):
            assert time.monotonic() < until, "it stays for good"
            time.sleep(0.05)
        assert list(tmp_path.rglob(held))


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    one = spool(tmp_path, largest=1 << 20, room=1 << 20)
    with full(50_000):
        error = refused(one, VIDEO + bytes(100_000))
    assert error.code == "out_of_memory" and "disk" in error.message
    assert set(contents(tmp_path).values()) == {b""}
    send(one, VIDEO + bytes(100_000))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("")
    one = spool(tmp_path / "file" / "uploads")
    assert "XDG_CACHE_HOME" in str(refused(one))


def test_a_cache_that_was_emptied_meanwhile_is_made_anew(tmp_path: Path) -> None:
    one = spool(tmp_path / "uploads")
    gone, other = send(one), send(one)
    next(tmp_path.rglob(gone)).unlink()
    for _ in range(2):
        with pytest.raises(PluginError, match="not any more; send the file again"):
            one.open(gone)
    with one.receive() as receiver:  # its bytes are lost, the server's other uploads are not
        shutil.rmtree(tmp_path / "uploads")
        with pytest.raises(PluginError, match="not any more; send the file again"):
            one.open(other)
        with one.open(send(one)) as file:
            assert file.read() == VIDEO
        receiver.write(VIDEO)
        receiver.finish()
    with pytest.raises(PluginError, match="not any more; send the file again"):
        one.open(receiver.upload.id)
    one.close()
    assert set(contents(tmp_path).values()) == {b""}


def test_links_are_left_alone(tmp_path: Path) -> None:
    elsewhere, parent = tmp_path / "elsewhere", tmp_path / "uploads"
    elsewhere.mkdir()
    parent.mkdir()
    (parent / "process-link").symlink_to(elsewhere)
    spool(parent)
    assert not list(elsewhere.iterdir())


def test_the_end_deletes_everything(tmp_path: Path) -> None:
    one, other = spool(tmp_path), spool(tmp_path)
    send(one)
    kept = send(other)
    one.close()
    one.close()
    assert refused(one).code == "bad_request"
    assert len(list(tmp_path.glob("process-*"))) == 1 and list(tmp_path.rglob(kept))


PROGRAM = """
import sys, time
from pathlib import Path
from mlx_onevision.plugins.service.spool import Spool
spool = Spool(Path(sys.argv[1]), max_file_bytes=10**6, max_total_bytes=10**6)
with spool.receive() as receiver:
    receiver.write(b"\\0\\0\\0\\x18ftypmp42" + bytes(100))
    receiver.finish()
    print("there", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        (folder,) = tmp_path.glob("process-*")
        spool(tmp_path)
        assert folder.is_dir()  # it lives
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert folder.is_dir()
        spool(tmp_path)
        assert not folder.exists()


def test_other_servers_take_uploads_while_what_was_left_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "process-left").mkdir()
    delete, taken = shutil.rmtree, list[bool]()

    def deleting(folder: Path) -> None:
        descriptor = os.open(tmp_path / module.LOCK_FILE, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken.append(True)
        finally:
            os.close(descriptor)
        delete(folder)

    monkeypatch.setattr(shutil, "rmtree", deleting)
    spool(tmp_path)
    assert taken == [True] and not (tmp_path / "process-left").exists()
