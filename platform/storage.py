"""A folder that outlives the process: on this machine, or behind any pyarrow filesystem.

Every durable write goes through here, and what the filesystem refuses is told with its way out. It
must not know what the files mean.
"""

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from fellray.platform.disk import append_to_file, map_ranges, sync_folder, write_file
from fellray.platform.errors import FellrayError, HeldError
from fellray.platform.lock import check_file, hold_object, is_file_held, is_object_held, take_file

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_PAUSE_S = 0.02
"""Between two tries for a lock."""

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

    def name(self) -> str:
        """Of the folder itself."""
        return self._parts()[1]

    def parent(self) -> str:
        """The URI of the folder that this one lies in."""
        above, _, query = self._parts()
        return above + query

    def beside(self, folder: str) -> "Storage":
        """The storage of a folder next to this one."""
        return Storage(self.parent(), self._given).sub(folder)

    def local(self, path: str = "") -> str | None:
        """Where it lies on this machine's disks, shared ones too; None behind anything else."""
        filesystem, full = self._locate(path)
        return full if isinstance(filesystem, LocalFileSystem) else None

    def read(self, path: str) -> bytes:
        """The whole file."""
        filesystem, full = self._locate(path)
        with self._explained("read", path), filesystem.open_input_file(full) as file:
            data: bytes = file.read()
            return data

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Bytes at each (offset, size), fewer where the file ends; the caller may write to them.

        On this machine they are the file's pages, mapped into memory.
        """
        filesystem, full = self._locate(path)
        with self._explained("read", path):
            if isinstance(filesystem, LocalFileSystem):
                return map_ranges(full, ranges)
            with filesystem.open_input_file(full) as file:
                return [
                    memoryview(bytearray(file.read_at(size, offset))) for offset, size in ranges
                ]

    def write(self, path: str, data: bytes) -> None:
        """Put the whole file there, or leave everything as it was.

        On this machine the file and its folder are on the disk when the call returns.
        """
        filesystem, full = self._locate(path)
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        with self._explained("write", path):
            if isinstance(filesystem, LocalFileSystem):
                write_file(full, temporary, data)
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
                append_to_file(full, data)
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
                sync_folder(os.path.dirname(full))
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
    def lock(self, name: str, wait_s: float = 0.0) -> Iterator[Callable[[], None]]:
        """Hold the folder for one process at a time; yields a check that it is still held.

        Args:
            wait_s: how long others are waited for.

        On this machine the lock is the operating system's and ends with the process, however that
        ends. Elsewhere it is an object (`locks/<name>`) renewed every `lock.BEAT` seconds and dead
        after `lock.DEAD`; as such filesystems have no compare-and-swap, call the check before what
        matters.

        Raises:
            FellrayError: somebody else holds it (who, since when, and what to do); from the check:
                it was lost.
        """
        deadline = time.monotonic() + wait_s
        with ExitStack() as held:
            while True:
                try:
                    check = held.enter_context(self._hold(f"locks/{name}"))
                    break
                except HeldError:
                    if time.monotonic() >= deadline:
                        raise
                time.sleep(_PAUSE_S)
            yield check

    @contextmanager
    def _hold(self, path: str) -> Iterator[Callable[[], None]]:
        filesystem, full = self._locate(path)
        if not isinstance(filesystem, LocalFileSystem):
            with hold_object(self, path) as check:
                yield check
            return
        with self._explained("lock", path):
            descriptor = take_file(full, str(self))
        try:
            yield partial(check_file, descriptor, full)
        finally:
            os.close(descriptor)

    def is_locked(self, name: str) -> bool:
        """Whether somebody holds the lock now; nothing is taken, and nothing is written."""
        path = f"locks/{name}"
        filesystem, full = self._locate(path)
        if isinstance(filesystem, LocalFileSystem):
            return is_file_held(full)
        return is_object_held(self, path)

    def _parts(self) -> tuple[str, str, str]:
        """The folder above, its own name, and what follows in a URI."""
        base, mark, query = self.uri.partition("?") if _URI.match(self.uri) else (self.uri, "", "")
        above, _, name = base.rstrip("/").rpartition("/")
        return above or "/", name, mark + query

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


def _check_parts(path: str) -> None:
    if ".." in path.split("/") or path.startswith("/"):
        raise FellrayError(f"{path!r}: must stay inside the storage: no '..' and no '/' in front")


def _is_temporary(info: Any) -> bool:
    return _TEMPORARY.fullmatch(info.base_name) is not None


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
