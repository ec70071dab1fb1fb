"""A folder that outlives the process: on this machine, or behind any pyarrow filesystem.

Here live the questions of every durable write: is it whole, is it really on the disk, who else
writes, and what to tell the user when it fails. It must not know what the files mean.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from fellray.platform.errors import FellrayError

BEAT = 10.0
"""Seconds between two signs of life of a lock that is an object."""
DEAD = 60.0
"""Seconds without a sign of life after which such a lock may be taken over."""
SETTLE = 2.0
"""Seconds after which two who took such a lock at once see who of them has it."""

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")

_WRONG_KIND = "a file stands where a folder is needed; move it away or choose another `storage`"
_FULL = "no space is left; free some or choose another `storage`; what was there before is intact"
_DENIED = "permission denied; give this user the right, or choose another `storage`"
_WAYS_OUT = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: _DENIED,
    errno.ENOTDIR: _WRONG_KIND,
    errno.EEXIST: _WRONG_KIND,
    errno.ENOENT: "does not exist; check the path, `storage` and `name`",
}


class Storage:
    """A folder at a path or at a URI of any pyarrow filesystem (`s3://`, `gs://`, `hdfs://` ...).

    Paths given to the methods are relative to the folder, with `/` between their parts. It travels
    to another process as its URI alone and is opened at the first use. Every method raises
    FellrayError, naming the path and the way out, where the filesystem refuses.
    """

    def __init__(self, uri: str | Path, filesystem: FileSystem | None = None) -> None:
        """`filesystem` stands in for the one the URI names (`uri` is then a path inside it)."""
        uri = os.fspath(uri)
        if filesystem is None and not _URI.match(uri):
            # another process may have another working directory
            uri = os.path.abspath(os.path.expanduser(uri))
        self.uri = uri
        self._given = filesystem
        self._opened: tuple[FileSystem, str] | None = None

    def __str__(self) -> str:
        """The URI as it may be shown: without a password and without its query."""
        if not _URI.match(self.uri):
            return self.uri
        return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:***@", self.uri.partition("?")[0])

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        assert self._given is None, "a storage with a filesystem of its own cannot travel"
        return Storage, (self.uri,)

    def sub(self, folder: str) -> "Storage":
        """The storage of a folder in this one; nothing is created yet."""
        _check_parts(folder)
        base, mark, query = self.uri.partition("?") if _URI.match(self.uri) else (self.uri, "", "")
        return Storage(f"{base.rstrip('/')}/{folder}{mark}{query}", self._given)

    def read(self, path: str) -> bytes:
        """The whole file."""
        filesystem, full = self._locate(path)
        with self._explained("read", path), filesystem.open_input_file(full) as file:
            data: bytes = file.read()
            return data

    def write(self, path: str, data: bytes) -> None:
        """Put the whole file there, or leave everything as it was.

        On this machine the file and its folder are on the disk when the call returns.
        """
        filesystem, full = self._locate(path)
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        with self._explained("write", path):
            if isinstance(filesystem, LocalFileSystem):
                _write_local(full, temporary, data)
            else:
                _write_remote(filesystem, full, temporary, data)

    def append(self, path: str, data: bytes) -> None:
        """Add to the end of the file, all of `data` or nothing.

        Elsewhere than on this machine the file is written anew: object stores cannot append, and
        where a filesystem can, a failed append could not be taken back.
        """
        filesystem, full = self._locate(path)
        if not self.exists(path):
            self.write(path, data)
        elif isinstance(filesystem, LocalFileSystem):
            with self._explained("append to", path):
                _append_local(full, data)
        else:
            self.write(path, self.read(path) + data)

    def exists(self, path: str) -> bool:
        """Whether a file or a folder is there."""
        filesystem, full = self._locate(path)
        with self._explained("look at", path):
            return bool(filesystem.get_file_info(full).type != FileType.NotFound)

    def list(self, folder: str = "") -> list[str]:
        """Sorted names of the files and folders in a folder; none where there is no such folder."""
        return sorted(info.base_name for info in self._infos(folder) if not _is_temporary(info))

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file in a folder, asked for in one go."""
        infos = self._infos(folder)
        return {
            info.base_name: info.size
            for info in infos
            if info.type == FileType.File and not _is_temporary(info)
        }

    def delete(self, path: str) -> None:
        """Remove a file, or a folder with all it holds; nothing happens where neither is."""
        filesystem, full = self._locate(path)
        with self._explained("delete", path), suppress(FileNotFoundError):
            kind = filesystem.get_file_info(full).type
            if isinstance(filesystem, LocalFileSystem):
                if kind == FileType.Directory:
                    shutil.rmtree(full)
                else:
                    os.unlink(full)
                _sync_folder(os.path.dirname(full))
            elif kind == FileType.Directory:
                filesystem.delete_dir(full)
            elif kind == FileType.File:
                filesystem.delete_file(full)

    def sweep(self, folder: str = "") -> None:
        """Remove the temporary files of writers that were killed; nobody may be writing there."""
        for info in self._infos(folder):
            if _is_temporary(info):
                self.delete(f"{folder}/{info.base_name}" if folder else info.base_name)

    @contextmanager
    def lock(self, name: str) -> Iterator[Callable[[], None]]:
        """Hold the folder for one process at a time; yields a check that it is still held.

        On this machine the lock is the operating system's and ends with the process, however that
        ends. Elsewhere it is an object (`locks/<name>`) renewed every BEAT seconds and dead after
        DEAD; as such filesystems have no compare-and-swap, call the check before what matters.

        Raises:
            FellrayError: somebody else holds it (who, since when, and what to do); from the check:
                it was lost.
        """
        filesystem, full = self._locate(f"locks/{name}")
        local = isinstance(filesystem, LocalFileSystem)
        with self._lock_file(full, name) if local else self._lock_object(name) as check:
            yield check

    @contextmanager
    def _lock_file(self, full: str, name: str) -> Iterator[Callable[[], None]]:
        with self._explained("lock", f"locks/{name}"):
            _make_folders(os.path.dirname(full))
            descriptor = os.open(full, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with self._explained("lock", f"locks/{name}"):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = _parse_holder(os.pread(descriptor, 4096, 0))
                    way_out = "wait until it ends, or end it: the lock goes with the process"
                    raise FellrayError(f"{self}: locked by {_who(holder)}; {way_out}") from None
                os.ftruncate(descriptor, 0)
                _write_all(descriptor, _encode_holder("", _now()))

            def check() -> None:
                if os.fstat(descriptor).st_nlink == 0:
                    raise FellrayError(
                        f"{full}: the lock was deleted while the run held it, so that another "
                        "could start; end the others, then resume"
                    )

            yield check
        finally:
            os.close(descriptor)

    @contextmanager
    def _lock_object(self, name: str) -> Iterator[Callable[[], None]]:
        path = f"locks/{name}"
        mine = uuid.uuid4().hex
        since = _now()

        def holder() -> Mapping[str, Any]:
            return _parse_holder(self.read(path)) if self.exists(path) else {}

        def refuse(other: Mapping[str, Any]) -> None:
            raise FellrayError(
                f"{self}: locked by {_who(other)}; wait until it ends, or end it: the lock counts "
                f"as dead {DEAD:.0f} s after its last sign of life"
            )

        def check() -> None:
            if (other := holder()).get("owner") != mine:
                raise FellrayError(
                    f"{self}/{path}: the lock was lost to {_who(other)}, after more than "
                    f"{DEAD:.0f} s without a sign of life or because it was deleted; resume when "
                    "the other has ended"
                )

        def beat() -> None:
            while not ended.wait(BEAT):
                # a storage out of reach is tried again; a lost lock is reported by `check`
                with suppress(FellrayError):
                    check()
                    self.write(path, _encode_holder(mine, since))

        if found := holder():
            if time.time() - found["beat"] < DEAD:
                refuse(found)
            # it looks dead by this machine's clock: watch for a beat, in case the clocks differ
            time.sleep(2 * BEAT)
            if (again := holder()) and again != found:
                refuse(again)
        ended = threading.Event()
        beating = threading.Thread(target=beat, daemon=True)
        try:
            self.write(path, _encode_holder(mine, since))
            time.sleep(SETTLE)
            if (winner := holder()).get("owner") != mine:
                refuse(winner)
            beating.start()
            yield check
        finally:
            ended.set()
            if beating.ident is not None:
                beating.join()
            # out of reach: then it dies of silence
            with suppress(FellrayError):
                if holder().get("owner") == mine:
                    self.delete(path)

    def _locate(self, path: str) -> tuple[FileSystem, str]:
        _check_parts(path)
        if self._opened is None:
            self._opened = self._open()
        filesystem, base = self._opened
        return filesystem, f"{base.rstrip('/')}/{path}" if path else base

    def _open(self) -> tuple[FileSystem, str]:
        if self._given is not None:
            return self._given, self.uri
        if not _URI.match(self.uri):
            return LocalFileSystem(), self.uri
        try:
            filesystem, base = FileSystem.from_uri(self.uri)
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise FellrayError(
                f"{self}: cannot be opened ({str(error).replace(self.uri, str(self))}); `storage` "
                "takes a path or a URI of a pyarrow filesystem: file://, s3://, gs://, abfs://, "
                "hdfs://, fsspec+<protocol>://"
            ) from error
        return filesystem, base

    def _infos(self, folder: str) -> Sequence[Any]:
        filesystem, full = self._locate(folder)
        with self._explained("list", folder):
            infos: Sequence[Any] = filesystem.get_file_info(
                FileSelector(full, allow_not_found=True)
            )
            return infos

    @contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            # filesystems written in Python raise the right class without its number
            known = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
            number = getattr(error, "errno", None) or known.get(type(error), 0)
            way_out = _WAYS_OUT.get(
                number,
                f"{getattr(error, 'strerror', None) or error}; check that the storage can be "
                "reached and that its credentials hold",
            )
            place = f"{self}/{path}" if path else str(self)
            raise FellrayError(f"{place}: cannot {verb}: {way_out}") from error


def to_json(value: Any, where: str, indent: int | None = None) -> str:
    """Strict JSON: what any reader can read, so neither NaN nor infinity.

    Raises:
        FellrayError: a number is not finite; `where` and the field are named.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=indent)
    except ValueError:
        field = _find_not_finite(value, "")
        if field is None:
            raise
        raise FellrayError(
            f"{where}: {field} is not finite. A loss that diverged is the usual cause: lower "
            "train.learning_rate or set train.clip"
        ) from None


def _find_not_finite(value: Any, field: str) -> str | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{field or 'the value'} ({value})"
    parts: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    found = (_find_not_finite(v, f"{field}.{k}" if field else str(k)) for k, v in parts)
    return next((f for f in found if f is not None), None)


def _check_parts(path: str) -> None:
    if ".." in path.split("/") or path.startswith("/"):
        raise FellrayError(f"{path!r}: must stay inside the storage: no '..' and no '/' in front")


def _is_temporary(info: Any) -> bool:
    return _TEMPORARY.fullmatch(info.base_name) is not None


def _write_local(full: str, temporary: str, data: bytes) -> None:
    folder = os.path.dirname(full)
    _make_folders(folder)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, full)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _write_remote(filesystem: FileSystem, full: str, temporary: str, data: bytes) -> None:
    filesystem.create_dir(full.rpartition("/")[0], recursive=True)
    try:
        with filesystem.open_output_stream(temporary) as file:
            file.write(data)
        filesystem.move(temporary, full)
    except BaseException:
        with suppress(OSError, pa.ArrowException):
            filesystem.delete_file(temporary)
        raise


def _append_local(full: str, data: bytes) -> None:
    descriptor = os.open(full, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _make_folders(folder: str) -> None:
    """Like os.makedirs, but each new folder's name is on the disk too."""
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        _make_folders(parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
        _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network filesystems do not know how to sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _encode_holder(owner: str, since: str) -> bytes:
    holder = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid()}
    return json.dumps({**holder, "since": since, "beat": time.time()}).encode()


def _parse_holder(data: bytes) -> Mapping[str, Any]:
    try:
        holder: Mapping[str, Any] = json.loads(data)
    except ValueError:
        return {"beat": 0.0}
    return holder


def _who(holder: Mapping[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
