"""Files are whole or absent, whoever writes beside, and what is read is what was checked."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from cat_plugin import files
from cat_plugin.errors import BundleError, LibraryError
from tests.disks import files_of_at_most, mounted, read_only

# Processes of their own that share nothing but the disk; forked, so that they start at once.
_FORK = multiprocessing.get_context("fork")


def write_pair(final: Path, mark: str, count: int) -> None:
    for number in range(count):
        with files.staged_directory(final) as staged:
            (staged / "a").write_text(f"{mark}{number}" * 1000)
            (staged / "b").write_text(f"{mark}{number}" * 1000)


def in_processes(*calls):
    started = [_FORK.Process(target=function, args=args) for function, *args in calls]
    for process in started:
        process.start()
    return started


def join(processes):
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_a_text_file_is_replaced_whole(tmp_path):
    path = tmp_path / "out.json"
    files.write_text(path, "first")
    files.write_text(path, "zweite Füllung")
    assert path.read_text("utf-8") == "zweite Füllung"
    assert path.stat().st_mode & 0o777 == 0o666 & ~int(os.popen("umask").read(), 8)
    with pytest.raises(TypeError):
        files.write_text(path, 3)
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        files.write_text(path, "x" * 2000)
    assert path.read_text("utf-8") == "zweite Füllung"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(final: Path) -> None:
    with files.staged_directory(final) as staged:
        (staged / "a").write_text("half")
        raise KeyboardInterrupt


def test_an_error_leaves_what_was_there(tmp_path):
    final = tmp_path / "out"
    write_pair(final, "x", 1)
    with pytest.raises(KeyboardInterrupt):
        interrupted(final)
    assert (final / "a").read_text() == "x0" * 1000
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("swap", [True, False])
def test_a_directory_is_replaced_with_all_that_was_in_it(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    final = tmp_path / "out"
    write_pair(final, "x", 1)
    (final / "stale").write_text("old")
    write_pair(final, "y", 1)
    assert sorted(path.name for path in final.iterdir()) == ["a", "b"]
    assert (final / "b").read_text() == "y0" * 1000
    assert list(tmp_path.iterdir()) == [final]


def test_without_a_swap_the_old_directory_comes_back(tmp_path, monkeypatch):
    final = tmp_path / "out"
    write_pair(final, "x", 1)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    rename = Path.rename

    def refuse(self, target):
        if self.name == "out" and self != final:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"):
        write_pair(final, "y", 1)
    assert (final / "a").read_text() == "x0" * 1000
    assert list(tmp_path.iterdir()) == [final]


def test_two_processes_that_write_one_directory_do_not_mix(tmp_path):
    final = tmp_path / "out"
    write_pair(final, "z", 1)
    processes = in_processes((write_pair, final, "x", 150), (write_pair, final, "y", 150))
    looked = 0
    while any(process.is_alive() for process in processes):
        # There is a whole directory at every moment: the names are swapped.
        assert (final / "a").exists()
        looked += 1
    join(processes)
    assert looked
    assert (final / "a").read_text() == (final / "b").read_text()
    assert (final / "a").read_text()[:4] in ("x149", "y149")
    assert list(tmp_path.iterdir()) == [final]


def killed_inside(final: Path) -> None:
    with files.staged_directory(final) as staged:
        (staged / "a").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    final = tmp_path / "out"
    (process,) = in_processes((killed_inside, final))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name.endswith(files.PART) for path in tmp_path.iterdir()] == [True]
    (tmp_path / ".out.backup").mkdir()
    with files.staged_directory(final) as staged:
        (staged / "a").write_text("first")
        write_pair(final, "y", 1)
    assert (final / "a").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.backup"}


def test_a_lock_is_for_one(tmp_path):
    with files.locked(tmp_path), pytest.raises(BlockingIOError), files.locked(tmp_path, wait=False):
        pass
    with files.locked(tmp_path, wait=False):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write_pair(tmp_path / "out", "x", 2)
    assert (tmp_path / "out" / "a").read_text() == "x1" * 1000


def test_a_full_disk_and_a_read_only_one(tmp_path):
    with mounted(tmp_path, "size=16k"):
        with (
            pytest.raises(OSError, match="No space left"),
            files.staged_directory(tmp_path / "out") as staged,
        ):
            (staged / "a").write_bytes(bytes(2**20))
        assert list(tmp_path.iterdir()) == []
    with read_only(tmp_path / "fixed") as place:
        with pytest.raises(OSError, match=r"Read-only|denied"):
            files.write_text(place / "a", "text")
        with pytest.raises(OSError, match=r"Read-only|denied"):
            write_pair(place / "out", "x", 1)


def entry(data: bytes) -> dict[str, object]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_what_was_checked_is_what_is_read(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"right")
    with files.checked(path, entry(b"right"), BundleError, "again") as stream:
        path.unlink()
        path.write_bytes(b"wrong")
        assert stream.read() == b"right"
    with (
        pytest.raises(BundleError, match="does not match the sha256"),
        files.checked(path, entry(b"right"), BundleError, "again"),
    ):
        pass


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "data").write_bytes(b"right")
    (tmp_path / "link").symlink_to("data")
    for name in ("pipe", "folder", "link", "none", "nul\0"):
        with (
            pytest.raises(LibraryError),
            files.checked(tmp_path / name, entry(b"right"), LibraryError, "again"),
        ):
            pass
        if name != "link":
            with pytest.raises(LibraryError):
                files.read_json(tmp_path / name, 100, LibraryError, "again")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 10_000, b"9" * 5000, b" " * 20_000])
def test_what_is_no_json_is_refused(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(BundleError, match="again"):
        files.read_json(tmp_path / "x.json", 10_000, BundleError, "copy it again")
