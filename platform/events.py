"""New interactions of one client's users: a file that only grows, written by several processes.

An event is stored once by its id. A writer holds the file's lock while it looks for ids, adds whole
lines and waits for the disk; the lock is the operating system's and ends with the process. Of a
writer that was killed whole lines stay, which nobody was told about, and the next writer cuts the
torn one off. What others have written is read from where one left off, so a call costs what is new.

It must not know which items, users or clients there are, nor what an event is used for.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fellray.platform.disk import make_folders, sync_folder, write_all
from fellray.platform.errors import FellrayError

WAIT_S = 10.0
"""How long a writer waits for the others."""
_PAUSE_S = 0.001
"""Between two tries for the lock."""
_DIGITS = 32
_MARK = b', "sha256": "'


@dataclass(frozen=True)
class Event:
    """A user met an item."""

    event_id: str
    """Unique within the client."""
    user_id: int
    item_id: int
    timestamp: int
    """Unix seconds."""


class EventLog:
    """The events of one client. Several threads may read, one at a time may add."""

    def __init__(self, path: str, since: int = 0):
        """Args: path: of the file; it need not be there. since: bytes at its beginning whose events
        are part of the data, so that `later` leaves them out."""
        self.path = path
        self._since = since
        self._reading = threading.Lock()
        self._read = self._durable = 0
        """Bytes from the beginning: read, and known to be on the disk."""
        self._file: tuple[int, int] | None = None
        self._digest: dict[str, bytes] = {}
        """Event id -> what it stands for."""
        self._later: dict[int, list[tuple[int, int]]] = {}
        """User -> timestamp and item of each event that is not part of the data, as they came."""

    def later(self, user_id: int) -> list[int]:
        """Ids of the items that a user met since the data were prepared, oldest first.

        Events of one moment are in the order of their arrival. Whatever any process has stored
        before the call is there.

        Raises:
            FellrayError: the file is damaged or cannot be read.
        """
        self.catch_up()
        met = sorted(self._later.get(user_id, ()), key=lambda event: event[0])
        return [item for _, item in met]

    def count_later(self, user_ids: Sequence[int]) -> list[int]:
        """How many events of each user `later` has.

        Raises:
            FellrayError: as `later`.
        """
        self.catch_up()
        return [len(self._later.get(user_id, ())) for user_id in user_ids]

    def behind(self) -> int:
        """Bytes that were added since somebody looked."""
        with self._opened(os.O_RDONLY) as file:
            return 0 if file is None else max(0, os.fstat(file).st_size - self._read)

    def catch_up(self) -> None:
        """Read what was added since.

        Raises:
            FellrayError: the file is damaged or cannot be read.
        """
        with self._opened(os.O_RDONLY) as file:
            if file is not None:
                self._absorb(file)
            elif self._since:
                raise self._shorter(0)

    @contextmanager
    def writing(self, wait_s: float) -> Iterator[int]:
        """Hold the file, made where it is not there; its descriptor, once all of it was read.

        Raises:
            FellrayError: others hold it for too long, it is damaged, or the disk refuses.
        """
        if self._since and not os.path.exists(self.path):
            raise self._shorter(0)
        with self._opened(os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            assert file is not None
            self._lock(file, wait_s)
            if not os.fstat(file).st_size:
                sync_folder(os.path.dirname(self.path))
            self._absorb(file)
            if os.fstat(file).st_size > self._read:  # torn: its writer was killed
                os.ftruncate(file, self._read)
            yield file

    def knows(self, event: Event) -> bool | None:
        """Whether exactly this event is stored; None: its id is another one's."""
        held = self._digest.get(event.event_id)
        return False if held is None else (held == _digest(_say(event))) or None

    def append(self, file: int, events: Sequence[Event]) -> None:
        """Add new events and wait for the disk; also for what a killed writer left behind."""
        if events:
            write_all(file, b"".join(map(encode, events)))
            self._absorb(file)
        if self._durable < self._read:
            size = self._read
            os.fsync(file)
            self._durable = size

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int | None]:
        """A descriptor of its own, so that a network filesystem asks its server how long the file
        is; None where there is none. What the disk refuses is told with the file's name."""
        try:
            if flags & os.O_CREAT:
                make_folders(os.path.dirname(self.path))
            try:
                file = os.open(self.path, flags, 0o666)
            except FileNotFoundError:
                yield None
                return
            try:
                yield file
            finally:
                os.close(file)
        except OSError as error:
            raise FellrayError(
                f"{self.path}: cannot be used ({error.strerror}); free space, or give this user "
                "the right to read and write it"
            ) from error

    def _lock(self, file: int, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FellrayError(
                        f"{self.path}: held by another process for more than "
                        f"{round(wait_s, 2):g} s; end it"
                    ) from None
            time.sleep(_PAUSE_S)

    def _absorb(self, file: int) -> None:
        with self._reading:
            found = os.fstat(file)
            if found.st_size < self._since:
                raise self._shorter(found.st_size)
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._read:
                # the first time, or somebody has put another file there
                self._file, self._read, self._durable = (found.st_dev, found.st_ino), 0, 0
                self._digest, self._later = {}, {}
            while self._read < found.st_size:
                data = os.pread(file, found.st_size - self._read, self._read)
                end = data.rfind(b"\n") + 1
                for line in data[:end].splitlines(keepends=True):
                    self._enter(line)
                if not end:
                    return

    def _enter(self, line: bytes) -> None:
        event = decode(line)
        if event is None:
            raise FellrayError(
                f"{self.path}: is damaged at byte {self._read}: restore the file, or delete the "
                "line that begins there"
            )
        if event.event_id not in self._digest:
            self._digest[event.event_id] = bytes.fromhex(line[-_DIGITS - 3 : -3].decode())
            if self._read >= self._since:
                met = self._later.setdefault(event.user_id, [])
                met.append((event.timestamp, event.item_id))
        self._read += len(line)

    def _shorter(self, size: int) -> FellrayError:
        return FellrayError(
            f"{self.path}: has {size} bytes, and the data were prepared with the events in its "
            f"first {self._since}: restore the file, or say where it is with events=FOLDER"
        )


def encode(event: Event) -> bytes:
    """A line of the file, with a digest of what it says."""
    said = _say(event)
    return said + _MARK + _digest(said).hex().encode() + b'"}\n'


def decode(line: bytes) -> Event | None:
    """The event of a line, with or without its end; None where it is not what was written."""
    said, _, written = line.rstrip(b"\n").rpartition(_MARK)
    if written != _digest(said).hex().encode() + b'"}':
        return None
    return Event(**json.loads(said + b"}"))


def _say(event: Event) -> bytes:
    return json.dumps(vars(event)).encode()[:-1]


def _digest(said: bytes) -> bytes:
    return hashlib.sha256(said).digest()[: _DIGITS // 2]
