"""A round is committed or it did not happen, whoever is killed and whatever is cut off."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fellray.platform.errors import FellrayError
from fellray.platform.manifest import Staged
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage

WRITER = """
import os, sys
import torch
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage

torch.set_num_threads(1)

def write_rounds():
    rounds = Rounds(Storage(sys.argv[1]))
    number = (rounds.latest() or 0) + 1
    while True:
        value = torch.full((2, 20_000), float(number))
        staged = [
            rounds.stage(number, "one", ["a", "b"], {"w": value}),
            rounds.stage(number, "two", ["c", "d"], {"w": value}),
            rounds.stage(number, "server", [], {"s": value}),
        ]
        rounds.commit(number, staged, {"value": number})
        os.write(1, b"%d\\n" % number)
        rounds.prune(2)
        number += 1

for _ in sys.stdin:  # torch is imported once, each writer is a fork
    child = os.fork()
    if child == 0:
        os.write(1, b"%d\\n" % os.getpid())
        write_rounds()
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def rows(number: int, clients: list[str]) -> dict[str, torch.Tensor]:
    """Rows that tell their round, client and name."""
    codes = torch.tensor([100.0 * number + ord(client) for client in clients])
    return {
        "w": codes[:, None] + torch.tensor([0.0, 0.5]),
        "b": codes.to(torch.bfloat16),
        "e": torch.zeros(len(clients), 0, 3),
    }


def commit(rounds: Rounds, number: int, deal: dict[str, list[str]]) -> None:
    staged = [
        rounds.stage(number, h, clients, rows(number, clients)) for h, clients in deal.items()
    ]
    staged.append(rounds.stage(number, "server", [], {"shared": torch.tensor(float(number))}))
    rounds.commit(number, staged, {"loss": number / 3, "n": number})


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    memory = f"fsspec+memory://{uuid.uuid4().hex}/run"
    return Storage(tmp_path if request.param == "local" else memory)


def test_rows_come_back_in_the_order_asked_from_any_deal(storage: Storage) -> None:
    rounds = Rounds(storage)
    assert rounds.latest() is None
    assert rounds.committed() == []
    commit(rounds, 0, {"x": ["c", "a"], "y": ["b"]})
    commit(rounds, 1, {"z": ["a", "b", "c"]})
    resumed = Rounds(storage)
    assert resumed.latest() == 1
    assert resumed.committed() == [0, 1]
    assert resumed.facts(1) == {"loss": 1 / 3, "n": 1}
    assert resumed.clients(0) == ["a", "b", "c"]
    for number in (0, 1):
        loaded = resumed.load(number, ["b", "c", "a"], ["w", "b", "e"])
        for name, want in rows(number, ["b", "c", "a"]).items():
            assert loaded[name].dtype == want.dtype
            assert torch.equal(loaded[name], want)
        assert torch.equal(resumed.load(number, ["a"], ["w"])["w"], rows(number, ["a"])["w"])
        assert resumed.load_shared(number, "shared").item() == number


def test_hashes_look_at_a_client_s_bytes_alone(storage: Storage) -> None:
    rounds = Rounds(storage)
    commit(rounds, 1, {"x": ["c", "a"], "y": ["b"]})
    hashes = rounds.hashes(1, ["w", "e", "b"])
    assert list(hashes) == ["a", "b", "c"]
    w = np.array([197.0, 197.5], dtype="<f4").tobytes()
    # 197 fits bfloat16's 8 bits, so that its bytes are the upper half of float32's
    b = np.array([197.0], dtype="<f4").tobytes()[2:]
    assert hashes["a"] == hashlib.sha256(w + b).hexdigest()
    assert rounds.hashes(1, ["b", "w"])["a"] == hashlib.sha256(b + w).hexdigest()
    again = Rounds(storage.sub("again"))
    commit(again, 1, {"p": ["b", "d", "a"], "q": ["c"]})
    others = again.hashes(1, ["w", "e", "b"])
    assert {c: others[c] for c in "abc"} == hashes
    assert rounds.hashes(1, ["w"])["a"] != rounds.hashes(1, ["w"])["b"]


def test_a_client_s_tensors_may_lie_in_two_files_but_not_one_tensor_twice(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    one = rounds.stage(1, "client", ["a"], {"w": torch.ones(1, 2)})
    two = rounds.stage(1, "bank", ["b", "a"], {"v": torch.tensor([2.0, 3.0])})
    again = rounds.stage(1, "again", ["a"], {"v": torch.ones(1)})
    with pytest.raises(ValueError, match=r"again.* and bank.* both claim 'v' of client 'a'"):
        rounds.commit(1, [again, two], {})
    shared = [rounds.stage(1, h, [], {"s": torch.ones(1)}) for h in "xy"]
    with pytest.raises(ValueError, match="'s' of nobody"):
        rounds.commit(1, shared, {})
    with pytest.raises(ValueError, match="staged twice"):
        rounds.commit(1, [one, one], {})
    assert rounds.latest() is None
    rounds.commit(1, [one, two], {})
    loaded = rounds.load(1, ["a"], ["v", "w"])
    assert loaded["v"].tolist() == [3.0]
    assert loaded["w"].tolist() == [[1.0, 1.0]]
    with pytest.raises(FellrayError, match="has no 'w' for 1 of 2 clients, first 'b'"):
        rounds.load(1, ["a", "b"], ["w"])
    with pytest.raises(FellrayError, match="has no 'u' for 1 of 1 clients"):
        rounds.load(1, ["a"], ["u"])
    with pytest.raises(FellrayError, match="has no shared 'v'"):
        rounds.load_shared(1, "v")
    assert rounds.clients(1) == ["a", "b"]


def test_files_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    one = rounds.stage(1, "one", ["a"], {"w": torch.ones(1, 2)})
    two = rounds.stage(1, "two", ["b"], {"w": torch.ones(1, 2, dtype=torch.float64)})
    rounds.commit(1, [one, two], {})
    with pytest.raises(FellrayError, match=r"two\.safetensors: w has another shape or dtype"):
        rounds.load(1, ["b", "a"], ["w"])


def test_the_same_tensors_make_the_same_file_views_and_all(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(2, 6)
    views = {"x": base[:, :3], "y": base[:, 3:], "t": base[:, :3], "n": base.T[:2]}
    first = Rounds(Storage(tmp_path / "1")).stage(1, "h", ["a", "b"], views)
    copies = {name: views[name].clone() for name in reversed(views)}
    second = Rounds(Storage(tmp_path / "2")).stage(1, "h", ["a", "b"], copies)
    assert first == second
    assert first.tensors == ("n", "t", "x", "y")
    rounds = Rounds(Storage(tmp_path / "1"))
    rounds.commit(1, [first], {})
    for name, value in rounds.load(1, ["b", "a"], list(views)).items():
        assert torch.equal(value, views[name].flip(0))


def test_staging_alone_is_no_round_and_a_commit_needs_every_file(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    staged = rounds.stage(4, "h", ["a"], rows(4, ["a"]))
    assert rounds.latest() is None
    with pytest.raises(FellrayError, match=r"manifest\.json: is not there: .* no other round is"):
        rounds.load(4, ["a"], ["w"])
    elsewhere = Staged("far.safetensors", "0" * 64, 10, ("b",), ("w",))
    with pytest.raises(FellrayError, match=r"far\.safetensors: has no bytes where 10 were staged"):
        rounds.commit(4, [staged, elsewhere], {})
    with pytest.raises(FellrayError, match=r"manifest\.json: facts\.loss \(nan\) is not finite"):
        rounds.commit(4, [staged], {"loss": float("nan")})
    assert rounds.latest() is None
    rounds.commit(4, [staged], {})
    assert rounds.latest() == 4


def test_a_committed_round_is_never_written_again(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    commit(rounds, 1, {"h": ["a"]})
    with pytest.raises(FellrayError, match="round 1 is committed already"):
        rounds.stage(1, "h", ["a"], rows(2, ["a"]))
    with pytest.raises(FellrayError, match="round 1 is committed already"):
        rounds.commit(1, [], {})
    assert torch.equal(rounds.load(1, ["a"], ["w"])["w"], rows(1, ["a"])["w"])


def test_a_broken_round_can_be_done_again_and_never_half(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    commit(rounds, 1, {"h": ["a"], "i": ["b"]})
    file = tmp_path / "rounds/000001/h.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert rounds.latest() is None
    rounds.stage(1, "h", ["a"], rows(7, ["a"]))  # of the old size again, with new content
    assert rounds.latest() is None
    commit(rounds, 1, {"h": ["a"], "i": ["b"]})
    assert torch.equal(rounds.load(1, ["a", "b"], ["w"])["w"], rows(1, ["a", "b"])["w"])


def test_a_newer_format_stops_the_run_instead_of_being_trained_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(Storage(tmp_path))
    monkeypatch.setattr("fellray.platform.manifest.VERSION", 2)
    commit(rounds, 1, {"h": ["a"]})
    monkeypatch.undo()
    with pytest.raises(FellrayError, match=r"has version 2, this fellray reads 1; use the fellray"):
        rounds.latest()


def test_a_storage_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(Storage(tmp_path))
    commit(rounds, 1, {"h": ["a"]})

    def refuse(self: Storage, path: str) -> bytes:
        raise FellrayError("out of reach")

    monkeypatch.setattr(Storage, "read", refuse)
    with pytest.raises(FellrayError, match="out of reach"):
        rounds.latest()


def test_prune_keeps_the_last_the_best_and_what_is_under_way(storage: Storage) -> None:
    rounds = Rounds(storage)
    for number in range(6):
        if number == 2:
            rounds.stage(number, "h", ["a"], rows(number, ["a"]))  # never committed
        else:
            commit(rounds, number, {"h": ["a"]})
    rounds.stage(6, "h", ["a"], rows(6, ["a"]))
    left = f"rounds/000005/.h.safetensors.{'0' * 32}.tmp"
    storage.write(left, b"half")
    storage.write("rounds/notes", b"mine")
    rounds.prune(2, [1])
    assert rounds.committed() == [1, 4, 5]
    assert storage.list("rounds") == ["000001", "000004", "000005", "000006", "notes"]
    assert not storage.exists(left)
    rounds.prune(1)
    assert rounds.committed() == [5]
    assert rounds.load_shared(5, "shared").item() == 5.0


def test_prune_before_anything_is_committed_deletes_nothing(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    rounds.stage(3, "h", ["a"], rows(3, ["a"]))
    rounds.prune(1)
    assert Storage(tmp_path).list("rounds") == ["000003"]


def test_a_round_deleted_by_half_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(Storage(tmp_path))
    for number in (1, 2):
        commit(rounds, number, {"h": ["a"]})
    monkeypatch.setattr("shutil.rmtree", lambda path: os.unlink(f"{path}/absent"))
    rounds.prune(1)
    assert rounds.committed() == [2]
    assert "h.safetensors" in Storage(tmp_path).list("rounds/000001")


@settings(max_examples=60, deadline=None)
@given(
    file=st.sampled_from(["x.safetensors", "y.safetensors", "server.safetensors", "manifest.json"]),
    share=st.floats(0, 1, exclude_max=True),
)
def test_a_file_cut_anywhere_gives_the_round_before(file: str, share: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(Storage(folder))
        for number in (1, 2):
            commit(rounds, number, {"x": ["a", "b"], "y": ["c"]})
        path = Path(folder, "rounds/000002", file)
        os.truncate(path, int(share * path.stat().st_size))
        assert rounds.latest() == 1
        with pytest.raises(FellrayError, match=rf"{file}: .*committed rounds: 1: restore"):
            rounds.load(2, ["a", "c"], ["w"])
        with pytest.raises(FellrayError, match=file):
            rounds.facts(2)
        got = rounds.load(1, ["c", "a"], ["w"])["w"]
        assert torch.equal(got, rows(1, ["c", "a"])["w"])


@settings(max_examples=60, deadline=None)
@given(
    file=st.sampled_from(["x.safetensors", "manifest.json"]),
    share=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_a_changed_byte_is_never_taken_for_data(file: str, share: float, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(Storage(folder))
        for number in (1, 2):
            commit(rounds, number, {"x": ["a", "b"], "y": ["c"]})
        path = Path(folder, "rounds/000002", file)
        data = bytearray(path.read_bytes())
        data[int(share * len(data))] ^= flip
        path.write_bytes(data)
        told = outcome(Rounds(Storage(folder)))
        if told is None:
            # only white space between the manifest's fields may change without changing it
            assert file == "manifest.json"
        else:
            assert f"rounds/000002/{file}" in told
            assert "committed rounds: 1" in told


def outcome(rounds: Rounds) -> str | None:
    """Round 2 as it was committed, or what the user is told."""
    try:
        got = rounds.load(2, ["a", "b"], ["w", "b", "e"])["w"]
        facts = rounds.facts(2)
    except FellrayError as error:
        return str(error)
    assert torch.equal(got, rows(2, ["a", "b"])["w"])
    assert facts == {"loss": 2 / 3, "n": 2}
    return None


def test_killed_at_any_moment_the_last_committed_round_loads(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for _ in range(12):
            writer.stdin.write("go\n")
            writer.stdin.flush()
            pid = int(writer.stdout.readline())
            told = int(writer.stdout.readline())
            time.sleep(0.1 * random.random())
            os.kill(pid, signal.SIGKILL)
            while (line := writer.stdout.readline()) != "dead\n":
                told = int(line)
            rounds = Rounds(Storage(tmp_path))
            latest = rounds.latest()
            assert latest in (told, told + 1)  # killed before it could tell of the last
            assert rounds.facts(latest) == {"value": latest}
            want = torch.full((4, 20_000), float(latest))
            assert torch.equal(rounds.load(latest, list("dbca"), ["w"])["w"], want)
            assert torch.equal(rounds.load_shared(latest, "s"), want[:2])
            rounds.prune(2)  # what kills before pruning left behind
            assert len(rounds.committed()) <= 2


# --- clients sampled from many -------------------------------------------------------------------


def asked(number: int) -> list[str]:
    """Three of 40 clients."""
    draw = np.random.default_rng(number)
    return [f"c{i:02d}" for i in sorted(draw.choice(40, 3, replace=False).tolist())]


def play_round(rounds: Rounds, number: int, carry: bool, keep: int = 0) -> None:
    clients = asked(number)
    values = {"w": torch.tensor([[100.0 * number + int(c[1:])] for c in clients])}
    moments = {"m": values["w"].double() * 2}
    staged = [
        rounds.stage(number, "values", clients, values),
        rounds.stage(number, "moments", clients, moments),
        rounds.stage(number, "server", [], {"shared": torch.tensor(float(number))}),
    ]
    carried = rounds.carry(number, staged) if carry else []
    written = sum(len(one.clients) * len(one.tensors) for one in carried)
    assert written <= sum(len(one.clients) * len(one.tensors) for one in staged)
    rounds.commit(number, [*staged, *carried], {})
    rounds.prune(2, [keep])


def test_the_last_pages_of_old_rounds_are_carried_on(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fellray.platform.pruning.SPARE", 5)
    plain, tidy = Rounds(storage.sub("plain")), Rounds(storage.sub("tidy"))
    reader = Rounds(storage.sub("tidy"))
    most = 0
    for number in range(80):
        keep = 30 if number >= 30 else 0
        play_round(plain, number, False, keep)
        play_round(tidy, number, True, keep)
        whole = plain.hashes(number, ["w", "m"])
        assert tidy.hashes(number, ["w", "m"]) == whole
        assert reader.hashes(number, ["w", "m"]) == whole
        assert tidy.committed() == plain.committed()
        if number > 50:
            most = max(most, len(storage.list("tidy/rounds")))
    # up to 30 stay for round 30, which is kept; the 40 clients' pages need no more than 40 / 3
    assert most <= 30 + 14 + 5
    assert tidy.hashes(30, ["w", "m"]) == plain.hashes(30, ["w", "m"])
    assert tidy.hashes(78, ["w", "m"]) == plain.hashes(78, ["w", "m"])
    again = Rounds(storage.sub("tidy"))
    assert again.hashes(79, ["w", "m"]) == plain.hashes(79, ["w", "m"])
    assert len(reader._where.index.manifests) <= 2 * 49 + 5 + 1


def test_without_old_rounds_nothing_is_carried(tmp_path: Path) -> None:
    rounds = Rounds(Storage(tmp_path))
    for number in range(20):
        play_round(rounds, number, True)
    assert not list(tmp_path.glob("rounds/*/carried*"))


@pytest.mark.parametrize("after", range(12))
def test_interrupted_while_pages_are_carried_no_state_is_lost(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fellray.platform.pruning.SPARE", 5)
    plain, tidy = Rounds(Storage(tmp_path / "plain")), Rounds(Storage(tmp_path / "tidy"))
    for number in range(21):
        play_round(plain, number, False)
    for number in range(20):
        play_round(tidy, number, True)
    left = after

    def interrupt(name: str) -> None:
        true = getattr(Storage, name)

        def act(self: Storage, *args: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            true(self, *args)

        monkeypatch.setattr(Storage, name, act)

    interrupt("write")
    interrupt("delete")
    with suppress(KeyboardInterrupt):
        play_round(tidy, 20, True)
    monkeypatch.undo()
    monkeypatch.setattr("fellray.platform.pruning.SPARE", 5)
    resumed = Rounds(Storage(tmp_path / "tidy"))
    latest = resumed.latest()
    # three files, two that carry, the manifest
    assert latest == (19 if after < 6 else 20)
    assert len(list(tmp_path.glob("tidy/rounds/000020/carried-*"))) == min(max(after - 3, 0), 2)
    assert resumed.hashes(19, ["w", "m"]) == plain.hashes(19, ["w", "m"])
    if latest == 19:
        play_round(resumed, 20, True)
    assert resumed.hashes(20, ["w", "m"]) == plain.hashes(20, ["w", "m"])
    play_round(resumed, 21, True)
    play_round(plain, 21, False)
    assert resumed.hashes(21, ["w", "m"]) == plain.hashes(21, ["w", "m"])


def test_a_round_asks_the_storage_as_often_however_many_rounds_have_left_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def count(name: str) -> None:
        true = getattr(Storage, name)

        def act(self: Storage, *args: object) -> object:
            nonlocal calls
            calls += 1
            return true(self, *args)

        monkeypatch.setattr(Storage, name, act)

    for name in ("read", "write", "exists", "sizes", "list", "delete", "sweep"):
        count(name)
    rounds = Rounds(Storage(tmp_path))
    per_round = []
    for number in range(100):
        before = calls
        clients = [f"c{number:03d}"]  # each asked once: every round stays
        staged = rounds.stage(number, "h", clients, {"w": torch.ones(1, 1)})
        rounds.commit(number, [staged], {})
        rounds.prune(2, [0])
        per_round.append(calls - before)
    assert len(Storage(tmp_path).list("rounds")) == 100
    assert per_round[10] == per_round[99]
