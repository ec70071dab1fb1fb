"""Locks: one process at a time holds a folder, by a file of this machine or by an object elsewhere.

It must not know what the folder is held for, nor which filesystem it lies on.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Protocol

from fellray.platform.disk import make_folders, write_all
from fellray.platform.errors import FellrayError, HeldError

BEAT = 10.0
"""Seconds between two signs of life of a lock that is an object."""
DEAD = 60.0
"""Seconds without a sign of life after which such a lock may be taken over."""
SETTLE = 2.0
"""Seconds after which two who took such a lock at once see who of them has it."""


class Folder(Protocol):
    """What a lock that is an object needs of the folder it lies in; as text, its name."""

    def exists(self, path: str) -> bool:
        """Whether the file is there."""
        ...

    def read(self, path: str) -> bytes:
        """The whole file."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Put the whole file there."""
        ...

    def delete(self, path: str) -> None:
        """Remove the file."""
        ...


def take_file(full: str, folder: str) -> int:
    """Lock a file of this machine; the lock goes with the descriptor, closed or its process ended.

    Args:
        full: the file, made where it is not there.
        folder: what an error calls the folder that it locks.

    Raises:
        HeldError: another process holds it.
        OSError: the disk refuses.
    """
    make_folders(os.path.dirname(full))
    descriptor = os.open(full, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _parse_holder(os.pread(descriptor, 4096, 0))
            way_out = "wait until it ends, or end it: the lock goes with the process"
            raise HeldError(f"{folder}: locked by {_who(holder)}; {way_out}") from None
        os.ftruncate(descriptor, 0)
        write_all(descriptor, _encode_holder("", _now()))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_file_held(full: str) -> bool:
    """Whether a process of this machine holds the lock; False where that cannot be asked."""
    try:
        descriptor = os.open(full, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def is_object_held(folder: Folder, path: str) -> bool:
    """Whether the lock `path` in a folder has shown a sign of life within `DEAD` seconds."""
    if not folder.exists(path):
        return False
    return bool(time.time() - _parse_holder(folder.read(path)).get("beat", 0.0) < DEAD)


def check_file(descriptor: int, full: str) -> None:
    """That the file taken is still the one others would take.

    Raises:
        FellrayError: it was deleted.
    """
    if os.fstat(descriptor).st_nlink == 0:
        raise FellrayError(
            f"{full}: the lock was deleted while the run held it, so that another "
            "could start; end the others, then resume"
        )


@contextmanager
def hold_object(folder: Folder, path: str) -> Iterator[Callable[[], None]]:
    """Hold the lock `path` in a folder; yields a check that it is still held.

    Raises:
        HeldError: somebody else holds it.
        FellrayError: from the check, it was lost.
    """
    mine = uuid.uuid4().hex
    since = _now()

    def holder() -> Mapping[str, Any]:
        return _parse_holder(folder.read(path)) if folder.exists(path) else {}

    def refuse(other: Mapping[str, Any]) -> None:
        raise HeldError(
            f"{folder}: locked by {_who(other)}; wait until it ends, or end it: the lock counts "
            f"as dead {DEAD:.0f} s after its last sign of life"
        )

    def check() -> None:
        if (other := holder()).get("owner") != mine:
            raise FellrayError(
                f"{folder}/{path}: the lock was lost to {_who(other)}, after more than "
                f"{DEAD:.0f} s without a sign of life or because it was deleted; resume when "
                "the other has ended"
            )

    def beat() -> None:
        while not ended.wait(BEAT):
            # a storage out of reach is tried again; a lost lock is reported by `check`
            with suppress(FellrayError):
                check()
                folder.write(path, _encode_holder(mine, since))

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
        folder.write(path, _encode_holder(mine, since))
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
                folder.delete(path)


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
