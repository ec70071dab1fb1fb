"""Rows of rounds that were not committed never stay, torn lines never count."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.storage import Storage

WRITER = """
import sys
from fellray.platform.journal import Journal
from fellray.platform.storage import Storage
journal = Journal(Storage(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    journal.record("metrics", [{"round": number, "client": c} for c in range(50)])
    print(number, flush=True)
    number += 1
"""


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    memory = f"fsspec+memory://{uuid.uuid4().hex}/run"
    return Storage(tmp_path if request.param == "local" else memory)


def row(round: int, **more: Any) -> dict[str, Any]:
    return {"round": round, **more}


def test_rows_come_back_and_resume_drops_what_was_not_committed(storage: Storage) -> None:
    journal = Journal(storage)
    assert journal.rows("metrics") == []
    journal.record("metrics", [row(0, loss=0.1), row(1, loss=None)])
    journal.record("metrics", iter([row(2, loss=1e-300, text="é\u2028\n")]))
    journal.record("ledger", [row(1, kind="up", bytes=3)])
    journal.record("ledger", [])
    assert journal.rows("metrics") == [
        row(0, loss=0.1),
        row(1, loss=None),
        row(2, loss=1e-300, text="é\u2028\n"),
    ]
    Journal(storage).resume(2)
    assert len(journal.rows("metrics")) == 3
    Journal(storage).resume(0)
    assert journal.rows("metrics") == [row(0, loss=0.1)]
    assert journal.rows("ledger") == []
    journal.record("metrics", [row(1, loss=0.2)])
    assert storage.read("metrics.jsonl") == (
        b'{"round": 0, "loss": 0.1}\n{"round": 1, "loss": 0.2}\n'
    )
    Journal(storage).resume(None)
    assert journal.rows("metrics") == []


def test_resume_leaves_no_file_where_none_was_and_sweeps(tmp_path: Path) -> None:
    left = tmp_path / f".summary.json.{'0' * 32}.tmp"
    left.write_bytes(b"{")
    Journal(Storage(tmp_path)).resume(None)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_is_not_finite_is_refused_and_nothing_is_added(storage: Storage) -> None:
    journal = Journal(storage)
    with pytest.raises(FellrayError, match=r"metrics\.jsonl: round 3: loss \(inf\) is not finite"):
        journal.record("metrics", [row(3), row(3, loss=float("inf"))])
    assert journal.rows("metrics") == []
    with pytest.raises(FellrayError, match=r"summary\.json: a\.1 \(nan\) is not finite"):
        journal.write_json("summary.json", {"a": [1, float("nan")]})
    assert storage.list() == []


def test_a_row_without_its_round_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    for wrong in ({}, {"round": None}, {"round": True}, {"round": 1.0}):
        with pytest.raises(AssertionError, match="needs its round"):
            Journal(Storage(tmp_path)).record("metrics", [wrong])


def test_a_full_disk_adds_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(Storage(tmp_path))
    journal.record("ledger", [row(1)])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FellrayError, match=r"ledger\.jsonl: cannot append to: no space is left"):
        journal.record("ledger", [row(2)])
    monkeypatch.undo()
    journal.record("ledger", [row(3)])
    assert journal.rows("ledger") == [row(1), row(3)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_anywhere_the_whole_lines_stay(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Storage(folder))
        all_rows = [row(number, loss=number / 7) for number in range(5)]
        journal.record("metrics", all_rows)
        path = Path(folder, "metrics.jsonl")
        whole = path.read_bytes()
        size = data.draw(st.integers(0, len(whole)))
        tail = data.draw(st.sampled_from([b"", b"\0" * 7]))
        path.write_bytes(whole[:size] + tail)
        # a line that lacks nothing but its end is whole, unless zeros follow
        want = (whole[:size] + (b"" if tail else b"\n")).count(b"}\n")
        assert journal.rows("metrics") == all_rows[:want]
        journal.resume(3)
        assert journal.rows("metrics") == all_rows[: min(want, 4)]
        journal.record("metrics", [row(4)])
        assert journal.rows("metrics") == [*all_rows[: min(want, 4)], row(4)]


def test_damage_before_whole_rows_is_named_and_after_the_last_kept_one_dropped(
    tmp_path: Path,
) -> None:
    journal = Journal(Storage(tmp_path))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"round": 0}\n{"rou\n{"round": 1}\n')
    with pytest.raises(FellrayError, match=r"metrics\.jsonl: line 2 is damaged"):
        journal.rows("metrics")
    with pytest.raises(FellrayError, match=r"metrics\.jsonl: line 2 is damaged"):
        journal.resume(1)
    assert path.read_bytes() == b'{"round": 0}\n{"rou\n{"round": 1}\n'
    journal.resume(0)
    assert path.read_bytes() == b'{"round": 0}\n'


def test_killed_at_any_moment_what_was_recorded_is_there(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGKILL)
        told = [int(line) for line in child.stdout if line.endswith("\n")]
    journal = Journal(Storage(tmp_path))
    journal.resume(told[-1])
    want = [row(number, client=c) for number in told for c in range(50)]
    assert journal.rows("metrics") == want


def test_documents_are_written_whole(storage: Storage) -> None:
    journal = Journal(storage)
    journal.write_json("summary.json", {"b": 1, "a": [0.1]})
    journal.write_text("report.html", "<p>é</p>")
    assert storage.read("summary.json") == b'{\n  "b": 1,\n  "a": [\n    0.1\n  ]\n}\n'
    assert storage.read("report.html").decode() == "<p>é</p>"
    assert storage.list() == ["report.html", "summary.json"]
