"""Whole or not at all, on this machine and elsewhere; one process at a time."""

import errno
import mmap
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem, _MockFileSystem

from fellray.platform import lock as module
from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.platform.strict_json import to_json

HOLDER = """
import sys, time
from fellray.platform.storage import Storage
with Storage(sys.argv[1]).lock("run"):
    print("held", flush=True)
    time.sleep(60)
"""


def mock(folder: Path) -> Storage:
    return Storage("bucket/run", _MockFileSystem())


def memory(folder: Path) -> Storage:
    return Storage(f"fsspec+memory://{uuid.uuid4().hex}/run")


def subtree(folder: Path) -> Storage:
    return Storage("run", SubTreeFileSystem(str(folder), LocalFileSystem()))


def local(folder: Path) -> Storage:
    return Storage(folder / "run")


@pytest.fixture(params=[local, mock, memory, subtree])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    make: Callable[[Path], Storage] = request.param
    return make(tmp_path)


def test_every_filesystem_gives_back_what_it_was_given(storage: Storage) -> None:
    assert storage.list() == []
    assert storage.sizes("a") == {}
    assert not storage.exists("a/b")
    storage.write("a/b", b"one")
    storage.write("a/b", b"three")
    storage.append("a/log", b"1\n")
    storage.append("a/log", b"2\n")
    storage.write("c.gz", b"not gzip")
    assert storage.read("a/b") == b"three"
    assert storage.read("a/log") == b"1\n2\n"
    assert storage.read("c.gz") == b"not gzip"
    assert storage.list() == ["a", "c.gz"]
    assert storage.list("a") == ["b", "log"]
    assert storage.sizes("a") == {"b": 5, "log": 4}
    assert storage.sizes() == {"c.gz": 8}
    assert storage.exists("a")
    assert storage.sub("a").read("b") == b"three"
    storage.delete("c.gz")
    storage.delete("c.gz")
    storage.delete("a")
    assert storage.list() == []


def test_a_missing_file_is_named(storage: Storage) -> None:
    with pytest.raises(FellrayError, match=r"run/nothing: cannot read: does not exist"):
        storage.read("nothing")


def test_it_travels_as_its_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Storage("runs").sub("a b")
    here.write("x", b"1")
    sent = pickle.dumps(here)
    monkeypatch.chdir("/")
    assert pickle.loads(sent).read("x") == b"1"
    assert Storage((tmp_path / "runs").as_uri()).sub("a%20b").read("x") == b"1"
    there = memory(tmp_path)
    there.write("x", b"2")
    assert pickle.loads(pickle.dumps(there)).read("x") == b"2"


def test_the_uri_s_query_stays_behind_and_secrets_are_not_shown() -> None:
    bucket = Storage("s3://key:secret@bucket/runs?region=eu-north-1").sub("a/b")
    assert bucket.uri == "s3://key:secret@bucket/runs/a/b?region=eu-north-1"
    assert str(bucket) == "s3://key:***@bucket/runs/a/b"
    with pytest.raises(FellrayError) as caught:
        Storage("nope://key:secret@bucket/runs?token=hidden").list()
    assert "nope://key:***@bucket/runs: cannot be opened" in str(caught.value)
    assert "s3://" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_the_folder_next_to_it(tmp_path: Path) -> None:
    bucket = Storage("s3://bucket/runs/one?region=eu")
    assert (bucket.name(), bucket.parent()) == ("one", "s3://bucket/runs?region=eu")
    assert bucket.beside("two").uri == "s3://bucket/runs/two?region=eu"
    here = Storage(f"{tmp_path}/runs/one/")
    assert here.beside("two").uri == f"{tmp_path}/runs/two"
    assert here.local("events") == f"{tmp_path}/runs/one/events"
    assert Storage(f"file://{tmp_path}/one").local() == f"{tmp_path}/one"
    assert memory(tmp_path).local("events") is None
    with pytest.raises(FellrayError, match="must stay inside"):
        here.beside("../two")


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x"])
def test_nothing_leaves_the_folder(path: str, storage: Storage) -> None:
    with pytest.raises(FellrayError, match="must stay inside"):
        storage.write(path, b"")
    with pytest.raises(FellrayError, match="must stay inside"):
        storage.sub(path)


def fail(number: int) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


def half_then_full(real: Callable[[int, memoryview], int]) -> Callable[[int, memoryview], int]:
    """A disk that takes a few bytes and is then full."""
    calls = iter([2])

    def write(descriptor: int, data: memoryview) -> int:
        if (room := next(calls, 0)) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:room])

    return write


@pytest.mark.parametrize(
    ("act", "call"),
    [
        ("write", "write"),
        ("write", "fsync"),
        ("write", "replace"),
        ("append", "write"),
        ("append", "fsync"),
    ],
)
def test_a_full_disk_leaves_everything_as_it_was(
    act: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    storage.write("f", b"before")
    failing = half_then_full(os.write) if call == "write" else fail(errno.ENOSPC)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(FellrayError, match=r"/f: cannot (write|append to): no space is left"):
        getattr(storage, act)("f", b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert storage.read("f") == b"before"
    if call == "fsync":
        with pytest.raises(FellrayError, match="no space"):
            storage.append("new", b"x")
        assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failed_move_elsewhere_leaves_no_temporary_file(tmp_path: Path) -> None:
    storage = subtree(tmp_path)
    (tmp_path / "run/f/g").mkdir(parents=True)
    with pytest.raises(FellrayError, match="run/f: cannot write"):
        storage.write("f", b"x")  # a folder stands there
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["f"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_permission_denied_says_what_to_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", fail(number))
    with pytest.raises(FellrayError, match=r"/f: cannot write: permission denied; give this user"):
        Storage(tmp_path).write("f", b"x")


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(FellrayError, match="a file stands where a folder is needed"):
        local(tmp_path).write("f", b"x")


def test_an_os_error_that_nobody_knows_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", fail(errno.EIO))
    with pytest.raises(FellrayError, match=r"/f: cannot write: Input/output error; check"):
        Storage(tmp_path).write("f", b"x")


def test_temporary_files_of_the_killed_are_hidden_and_swept(storage: Storage) -> None:
    left = f".f.{'0' * 32}.tmp"
    storage.write("d/f", b"1")
    storage.write(f"d/{left}", b"half")
    assert storage.list("d") == ["f"]
    assert storage.sizes("d") == {"f": 1}
    storage.sweep("d")
    assert not storage.exists(f"d/{left}")
    assert storage.read("d/f") == b"1"


def hold(uri: str) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLDER, uri], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with hold(str(tmp_path)) as child:
        try:
            with (
                pytest.raises(FellrayError, match=f"locked by process {child.pid} on .* since 2"),
                storage.lock("run"),
            ):
                pass
        finally:
            child.send_signal(signal.SIGKILL)
    with storage.lock("run") as check:
        check()
        with pytest.raises(FellrayError, match=f"process {os.getpid()}"), storage.lock("run"):
            pass
        with storage.lock("another"):
            pass
    with storage.lock("run") as check:
        storage.delete("locks/run")
        with pytest.raises(FellrayError, match="the lock was deleted"):
            check()


def test_an_error_inside_the_lock_passes_through_and_frees_it(storage: Storage) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="mine"), storage.lock("run"):
            raise OSError("mine")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "SETTLE", 0.05)


def test_a_lock_object_is_renewed_checked_and_removed() -> None:
    filesystem: FileSystem = _MockFileSystem()
    mine, yours = Storage("bucket/run", filesystem), Storage("bucket/run", filesystem)
    with mine.lock("run") as check:
        first = mine.read("locks/run")
        with (
            pytest.raises(FellrayError, match=rf"locked by process {os.getpid()} on .* 60 s"),
            yours.lock("run"),
        ):
            pass
        deadline = time.monotonic() + 5
        while mine.read("locks/run") == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert mine.read("locks/run") != first
        check()
    assert mine.list("locks") == []
    with yours.lock("run"):
        pass


def test_a_dead_lock_object_is_taken_and_its_holder_told(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem: FileSystem = _MockFileSystem()
    mine, yours = Storage("bucket/run", filesystem), Storage("bucket/run", filesystem)
    with mine.lock("run") as check:
        frozen = mine.read("locks/run")
        monkeypatch.setattr(module, "DEAD", -1.0)  # yours has a clock that is ahead
        with pytest.raises(FellrayError, match="locked by"), yours.lock("run"):
            pass
        check()
    mine.write("locks/run", frozen)
    with yours.lock("run") as check:
        mine.write("locks/run", frozen)  # as if another had taken it over
        with pytest.raises(FellrayError, match=r"locks/run: the lock was lost to process"):
            check()
        time.sleep(0.25)
        assert mine.read("locks/run") == frozen
    assert mine.read("locks/run") == frozen


def test_of_two_who_take_a_lock_object_at_once_the_later_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = Storage("bucket/run", _MockFileSystem())
    rival = b'{"owner": "r", "pid": 7, "host": "far", "since": "now", "beat": 1.0}'
    monkeypatch.setattr(time, "sleep", lambda _: storage.write("locks/run", rival))
    with pytest.raises(FellrayError, match="locked by process 7 on far"), storage.lock("run"):
        pass
    assert storage.read("locks/run") == rival


def test_json_is_strict_and_names_the_field() -> None:
    assert to_json({"a": [1, 2.5, None]}, "f") == '{"a": [1, 2.5, null]}'
    with pytest.raises(FellrayError, match=r"^f: loss\.c1\.0 \(nan\) is not finite"):
        to_json({"ok": 1, "loss": {"c1": [float("nan")]}}, "f")
    with pytest.raises(FellrayError, match=r"the value \(inf\)"):
        to_json(float("inf"), "f")
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({float("nan"): 1}, "f")


def test_a_lock_can_be_looked_at(storage: Storage) -> None:
    assert not storage.is_locked("run")
    assert storage.list() == []
    with storage.lock("run"):
        assert storage.is_locked("run")
        assert not storage.is_locked("other")
    assert not storage.is_locked("run")


def test_ranges_are_the_files_pages(tmp_path: Path) -> None:
    """Copied neither when they are read, nor back into the file when they are written to."""
    storage = Storage(tmp_path)
    storage.write("x", bytes(range(10)))
    first, beyond, none = storage.read_ranges("x", [(2, 3), (8, 5), (20, 1)])
    assert isinstance(first.obj, mmap.mmap)
    assert (bytes(first), bytes(beyond), bytes(none)) == (b"\x02\x03\x04", b"\x08\t", b"")
    first[0] = 99
    assert storage.read("x") == bytes(range(10))
    storage.write("x", bytes(10))  # a new file in its place: this one stays as it was read
    storage.delete("x")
    assert bytes(first) == b"c\x03\x04"
    storage.write("empty", b"")
    assert bytes(storage.read_ranges("empty", [(0, 4)])[0]) == b""
    with pytest.raises(FellrayError, match="nothing"):
        storage.read_ranges("nothing", [(0, 1)])
