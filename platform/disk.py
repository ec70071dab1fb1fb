"""This machine's disk: whole files, there when the call returns.

It must not know what the files mean, nor that there are other filesystems. What the disk refuses
is raised as the OSError it is.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress


def write_file(full: str, temporary: str, data: bytes) -> None:
    """Put the whole file there by way of a temporary one beside it, or leave all as it was."""
    folder = os.path.dirname(full)
    make_folders(folder)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, full)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def map_ranges(full: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Bytes at each (offset, size) where they lie, fewer where the file ends; read when looked at.

    What is written to them reaches neither the file nor anybody else. The file may be replaced or
    deleted meanwhile, but must not be cut.
    """
    with open(full, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return [memoryview(b"") for _ in ranges]
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    return [whole[offset : offset + size] for offset, size in ranges]


def append_to_file(full: str, data: bytes) -> None:
    """Add all of `data` to the end of a file that is there, or nothing."""
    descriptor = os.open(full, os.O_WRONLY | os.O_APPEND)
    try:
        size = os.fstat(descriptor).st_size
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Like os.write, but all of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def make_folders(folder: str) -> None:
    """Like os.makedirs, but each new folder's name is on the disk too."""
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        make_folders(parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(parent)


def sync_folder(folder: str) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network filesystems do not know how to sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
