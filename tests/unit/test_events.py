"""One client's file of events: each id once, whatever dies, whoever else writes."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fellray.platform.errors import FellrayError
from fellray.platform.events import Event, EventLog, decode, encode
from fellray.platform.intake import Conflict, Stored, Taken, add_events, take_events


def event(number: int, user: int = 7, item: int = 1, timestamp: int = 100) -> Event:
    return Event(f"e{number}", user, item, timestamp)


def add(log: EventLog, *events: Event) -> Stored | Conflict:
    (answer,) = add_events([[("c0", one) for one in events]], {"c0": log}, 1.0)
    return answer


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "events" / "c0.jsonl")


def lines(path: str) -> list[bytes]:
    return Path(path).read_bytes().splitlines(keepends=True)


def test_a_line_says_what_it_is_and_that_it_is_whole() -> None:
    one = Event('a"\n\r\u2028é', -(2**63), 2**63 - 1, 0)
    line = encode(one)
    assert decode(line) == one
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    changed = json.loads(line) | {"item_id": 3}
    assert decode(json.dumps(changed).encode()) is None
    for broken in (line[:-9], b"", b"[]", b"{}", b"\x00" * 9, b'{"sha256": 1}'):
        assert decode(broken) is None


def test_each_event_once(path: str) -> None:
    log = EventLog(path)
    assert log.later(7) == []
    assert add(log, event(1), event(2)) == Stored(2, 0)
    assert add(log, event(2), event(3), event(3)) == Stored(1, 2)
    assert add(EventLog(path), event(1)) == Stored(0, 1)
    assert [decode(line) for line in lines(path)] == [event(1), event(2), event(3)]


def test_another_event_of_the_same_id_refuses_its_request_and_no_other(path: str) -> None:
    log = EventLog(path)
    add(log, event(1))
    assert add(log, event(2), event(1, item=9)) == Conflict(1)
    assert add(log, event(2), event(3), event(2, timestamp=5)) == Conflict(2)
    requests = [
        [("c0", event(4))],
        [("c0", event(5)), ("c0", event(4, user=8))],
        [("c0", event(5, item=2)), ("c0", event(4))],
    ]
    assert add_events(requests, {"c0": log}) == [Stored(1, 0), Conflict(1), Stored(1, 1)]
    assert [decode(line) for line in lines(path)] == [event(1), event(4), event(5, item=2)]


def test_a_request_of_two_clients_is_stored_in_both_files_or_in_none(tmp_path: Path) -> None:
    logs = {client: EventLog(str(tmp_path / client)) for client in ("a", "b")}
    add_events([[("b", event(1))]], logs)
    both = [("a", event(1, item=3)), ("b", event(1, item=3))]
    assert add_events([both], logs) == [Conflict(1)]
    assert lines(logs["a"].path) == []
    assert add_events([[both[0], ("b", event(1))]], logs) == [Stored(1, 1)]
    assert (logs["a"].later(7), logs["b"].later(7)) == ([3], [1])


def test_what_others_stored_is_there_at_the_next_look(path: str) -> None:
    mine, theirs = EventLog(path), EventLog(path)
    assert mine.later(7) == []
    add(theirs, event(1, item=5, timestamp=20), event(2, item=6, timestamp=10))
    assert mine.later(7) == [6, 5]
    add(mine, event(3, item=4, timestamp=20))
    assert theirs.later(7) == [6, 5, 4]
    assert theirs.later(8) == []
    assert theirs.behind() == 0


def test_a_look_reads_what_is_new_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log, other = EventLog(path), EventLog(path)
    add(other, *(event(n) for n in range(2000)))
    log.catch_up()
    size = os.path.getsize(path)
    sizes = []
    plain = os.pread

    def count(file: int, length: int, at: int) -> bytes:
        sizes.append(length)
        return plain(file, length, at)

    monkeypatch.setattr(os, "pread", count)
    assert log.behind() == 0
    add(log, event(2000))
    log.later(7)
    assert sum(sizes) == os.path.getsize(path) - size


def test_what_is_part_of_the_data_is_known_and_not_later(path: str) -> None:
    add(EventLog(path), event(1, item=5))
    since = os.path.getsize(path)
    add(EventLog(path), event(2, item=6))
    log = EventLog(path, since)
    assert log.later(7) == [6]
    assert add(log, event(1, item=5)) == Stored(0, 1)
    assert add(log, event(1)) == Conflict(0)
    os.truncate(path, 3)
    for look in (lambda: EventLog(path, since).later(7), lambda: add(log, event(9))):
        with pytest.raises(FellrayError, match="has 3 bytes, and the data were prepared with"):
            look()
    os.unlink(path)
    with pytest.raises(FellrayError, match="has 0 bytes"):
        EventLog(path, since).later(7)
    with pytest.raises(FellrayError, match="has 0 bytes"):
        add(EventLog(path, since), event(9))
    assert not os.path.exists(path)


@pytest.mark.parametrize("torn", [1, 20, len(encode(event(3))) - 1])
def test_a_torn_line_is_cut_off_by_the_next_writer(path: str, torn: int) -> None:
    log = EventLog(path)
    add(log, event(1))
    with open(path, "ab") as file:
        file.write(encode(event(2)) + encode(event(3))[:torn])
    reader = EventLog(path)
    assert len(reader.later(7)) == 2
    assert add(log, event(3), event(2)) == Stored(1, 1)
    assert [decode(line) for line in lines(path)] == [event(1), event(2), event(3)]
    assert len(reader.later(7)) == 3


def test_a_damaged_line_is_named(path: str) -> None:
    add(EventLog(path), event(1), event(2))
    data = Path(path).read_bytes()
    second = len(encode(event(1)))
    Path(path).write_bytes(data[:second] + data[second:].replace(b'"e2"', b'"e9"'))
    for look in (lambda: EventLog(path).later(7), lambda: add(EventLog(path), event(3))):
        with pytest.raises(FellrayError, match=f"is damaged at byte {second}"):
            look()


def test_another_file_in_its_place_is_read_anew(path: str) -> None:
    log = EventLog(path)
    add(log, event(1), event(2))
    os.unlink(path)
    add(EventLog(path), event(3, item=8))
    assert log.later(7) == [8]
    assert add(log, event(1)) == Stored(1, 0)


def test_the_disk_has_it_before_the_answer(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait for many events; also for those that a killed writer left without one."""
    synced = []
    plain = os.fsync

    def count(file: int) -> None:
        synced.append(os.fstat(file).st_size)
        plain(file)

    log = EventLog(path)
    add(log, event(0))
    monkeypatch.setattr(os, "fsync", count)
    add(log, *(event(n) for n in range(1, 100)))
    assert synced == [os.path.getsize(path)]
    add(log, event(5))
    assert len(synced) == 1
    with open(path, "ab") as file:
        file.write(encode(event(100)))
    assert add(log, event(100)) == Stored(0, 1)
    assert synced[1:] == [os.path.getsize(path)]


def test_a_writer_that_is_not_let_in_says_so(path: str) -> None:
    log = EventLog(path)
    add(log, event(1))
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FellrayError, match=r"held by another process for more than 0\.0\d* s"):
            add_events([[("c0", event(2))]], {"c0": log}, 0.05)
        assert log.later(7) == [1]
    assert add(log, event(2)) == Stored(1, 0)


def test_what_the_disk_refuses_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("")
    with pytest.raises(FellrayError, match=r"events/c0.jsonl: cannot be used \(Not a directory\)"):
        add(EventLog(str(tmp_path / "events" / "c0.jsonl")), event(1))


WRITER = """
import sys
from fellray.platform.events import Event, EventLog
from fellray.platform.intake import add_events

log = EventLog(sys.argv[1])
for at in range(0, 600, 3):
    events = [Event(f"e{n}", 7, 1, 100) for n in range(at, at + 3)]
    add_events([[("c0", one) for one in events]], {"c0": log}, 30.0)
"""


def test_writers_that_are_killed_leave_each_event_once(path: str) -> None:
    """Four processes store the same 600 events; two are killed while they do."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path]) for _ in range(4)]
    seen = EventLog(path)
    for victim, least in zip(writers[:2], (60, 200), strict=True):
        while len(seen.later(7)) < least:
            pass
        victim.kill()
    assert [writer.wait() for writer in writers] == [-9, -9, 0, 0]
    stored = [decode(line) for line in lines(path)]
    assert sorted(one.event_id for one in stored if one) == sorted(f"e{n}" for n in range(600))
    assert len(seen.later(7)) == 600


def test_threads_of_one_process_read_while_one_writes(path: str) -> None:
    log = EventLog(path)
    ended = threading.Event()
    lengths: list[int] = []

    def read() -> None:
        while not ended.is_set():
            lengths.append(len(log.later(7)))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for at in range(0, 400, 4):
        add(log, *(event(n) for n in range(at, at + 4)))
    ended.set()
    for reader in readers:
        reader.join()
    assert len(log.later(7)) == 400
    assert lengths


def test_taking_goes_on_where_it_ended(path: str) -> None:
    assert take_events(path, Taken()) == (Taken(), [])
    assert not os.path.exists(path)
    log = EventLog(path)
    add(log, event(1), event(2))
    first, events = take_events(path, Taken())
    assert events == [event(1), event(2)]
    assert (first.bytes, first.count) == (os.path.getsize(path), 2)
    assert take_events(path, first) == (first, [])
    with open(path, "ab") as file:
        file.write(encode(event(3)) + b'{"event_id": "torn')
    second, events = take_events(path, first)
    assert events == [event(3)]
    assert (second.bytes, second.count) == (os.path.getsize(path), 3)
    Path(path).write_bytes(encode(event(2)) + encode(event(1)) + encode(event(3)))
    with pytest.raises(FellrayError, match="are not those whose events were taken before"):
        take_events(path, first)
