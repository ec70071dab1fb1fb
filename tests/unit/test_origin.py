"""Where a run comes from and went on: what is written is read, and where events lie follows."""

from pathlib import Path

import pytest

from fellray.platform.errors import FellrayError
from fellray.platform.origin import (
    CONTINUATION,
    ORIGIN,
    Continuation,
    Origin,
    event_folder,
    read_continuation,
    read_origin,
    write_record,
)
from fellray.platform.storage import Storage


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "demo-2")
    assert (read_origin(storage), read_continuation(storage)) == (None, None)
    origin, continuation = Origin("demo-1", 3, "demo"), Continuation("demo-3", 5, 2)
    write_record(storage, origin)
    write_record(storage, continuation)
    assert (read_origin(storage), read_continuation(storage)) == (origin, continuation)


def test_a_line_of_runs_has_one_folder_of_events(tmp_path: Path) -> None:
    first, later = Storage(tmp_path / "demo"), Storage(tmp_path / "demo-2")
    write_record(later, Origin("demo-1", 3, "demo"))
    assert event_folder(first) == event_folder(later) == f"{tmp_path}/demo/events"
    assert event_folder(later, str(tmp_path / "there")) == f"{tmp_path}/there"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "run": "a", "round": 1, "rounds": 1, "first": "a"}',
        '{"version": 1, "run": "a", "round": "1", "rounds": 1, "first": "a"}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / ORIGIN).write_text(text)
    (tmp_path / CONTINUATION).write_text(text)
    with pytest.raises(FellrayError, match=r"origin.json: is damaged"):
        read_origin(Storage(tmp_path))
    with pytest.raises(FellrayError, match=r"continuation.json: is damaged"):
        read_continuation(Storage(tmp_path))
