"""Tokens: hashed at rest, each for one client or for the operator; so many requests a second."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fellray.platform.errors import FellrayError
from fellray.platform.storage import Storage
from fellray.serve.tokens import FILE, Bucket, Caller, TokenFile, new_token, read_tokens


def test_a_token_opens_its_own_clients_door(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    assert len(read_tokens(storage)) == 0
    own, other, operator = (new_token(storage, c) for c in ("c0", "c1", None))
    tokens = read_tokens(storage)
    assert len(tokens) == 3
    found = {token: tokens.find(token) for token in (own, other, operator)}
    opens = {
        token: {c for c in ("c0", "c1", "c2") if caller and caller.may_ask_for(c)}
        for token, caller in found.items()
    }
    assert opens == {own: {"c0"}, other: {"c1"}, operator: {"c0", "c1", "c2"}}
    for wrong in ("", own[:-1], own + "x", own.upper(), "\udcff"):
        assert tokens.find(wrong) is None


def test_the_file_holds_no_token(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    token = new_token(storage, "c0")
    text = (tmp_path / FILE).read_text()
    assert token not in text
    assert token.removeprefix("fellray_") not in text
    (entry,) = json.loads(text)["tokens"]
    assert (entry["client"], len(entry["sha256"])) == ("c0", 64)
    assert len(token) >= 43 + len("fellray_")  # 256 bits


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    new_token(storage, "c0")
    whole = json.loads((tmp_path / FILE).read_text())
    entry = whole["tokens"][0]
    damaged = [
        "{",
        "[]",
        json.dumps({**whole, "version": 2}),
        json.dumps({**whole, "tokens": [{**entry, "client": 3}]}),
        json.dumps({**whole, "tokens": [{**entry, "sha256": "00"}]}),
    ]
    for text in damaged:
        (tmp_path / FILE).write_text(text)
        with pytest.raises(FellrayError, match=r"tokens\.json: is damaged"):
            read_tokens(storage)


def test_new_tokens_count_without_a_restart(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    file = TokenFile(storage, poll_s=0.01)
    file.start()
    token = new_token(storage, None)
    for _ in range(1000):
        if file.tokens.find(token):
            break
        file._ended.wait(0.01)
    file.close()
    assert file.tokens.find(token) is not None


def test_the_command_makes_tokens_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fellray.jobs.serve_commands import token

    with pytest.raises(FellrayError, match="holds no run"):
        token(str(tmp_path), "c0")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.json").write_text("{}")
    for client, operator in ((None, False), ("c0", True)):
        with pytest.raises(FellrayError, match="name one client, or give --operator"):
            token(str(tmp_path), client, operator)
    token(str(tmp_path), "c0")
    token(str(tmp_path), None, operator=True, tokens=str(tmp_path / "else"))
    own, operators = capsys.readouterr().out.split()
    found = read_tokens(Storage(tmp_path)).find(own)
    assert found is not None
    assert found.client == "c0"
    assert read_tokens(Storage(tmp_path)).find(operators) is None
    assert read_tokens(Storage(tmp_path / "else")).find(operators) is not None


def test_a_bucket_fills_again() -> None:
    bucket, one, other = Bucket(rate=2, burst=3), Caller("a", "1"), Caller("b", "2")
    assert [bucket.take(one, now=0.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert bucket.take(other, now=0.0) == 0
    assert bucket.take(one, now=0.25) == 0.25
    assert bucket.take(one, now=0.5) == 0
    assert [bucket.take(one, now=100.0) for _ in range(4)] == [0, 0, 0, 0.5]


def test_a_bucket_is_a_clients_however_many_tokens_it_has() -> None:
    bucket = Bucket(rate=1, burst=2)
    assert [bucket.take(Caller("a", digest), now=0.0) for digest in "123"] == [0, 0, 1]
    assert [bucket.take(Caller(None, digest), now=0.0) for digest in "1122"] == [0, 0, 0, 0]


def test_a_batch_is_as_many_as_it_asks() -> None:
    """Bucket of 10: 1 and then 5 more; the next one waits, and passes after what it was told."""
    bucket, one = Bucket(rate=2, burst=10), Caller("a", "1")
    for now, expected in ((0.0, 0), (0.0, 1), (0.5, 0.5), (1.0, 0)):
        assert bucket.take(one, now=now) == 0
        assert bucket.take(one, 6, counted=1, now=now) == expected
    assert bucket.take(one, now=1.0) == 0.5
    # more than there is ever room for: from a full bucket, and paid for
    assert bucket.take(one, now=100.0) == 0
    assert bucket.take(one, 30, counted=1, now=100.0) == 0
    assert bucket.take(one, now=100.0) == 10.5


def test_who_makes_tokens_at_the_same_time_loses_none(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: new_token(Storage(tmp_path), f"c{n}"), range(24)))
    tokens = read_tokens(Storage(tmp_path))
    found = [tokens.find(token) for token in made]
    assert [caller and caller.client for caller in found] == [f"c{n}" for n in range(24)]


def test_a_token_of_nobody_is_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fellray.jobs.serve_commands import token

    (tmp_path / "config.json").write_text(json.dumps({"data": {"path": str(tiny_data)}}))
    with pytest.raises(FellrayError, match="has no client 'c44'; the nearest names are 'c4', "):
        token(str(tmp_path), "c44")
    assert not (tmp_path / FILE).exists()
    token(str(tmp_path), "c4")
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text(json.dumps({"data": {"path": str(tmp_path / "gone")}}))
    token(str(tmp_path), "c44")
    assert "not checked that there is a client 'c44'" in capsys.readouterr().err
    assert len(read_tokens(Storage(tmp_path))) == 2
