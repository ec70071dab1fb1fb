"""What Ray's errors come to: asked again, told, or begun again. No Ray is started."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fellray.actors.losses import name_cause, tell
from fellray.actors.pool import RayPool
from fellray.actors.remote import RayRemote
from fellray.actors.session import ray
from fellray.platform.errors import FellrayError
from fellray.platform.faults import TRIES
from fellray.platform.messages import StaleLease
from fellray.platform.places import Demand
from fellray.platform.seating import deal, describe_seats

LOST = ray.exceptions.ObjectLostError("ab" * 28, None, "")
RECONSTRUCTION = ray.exceptions.ObjectReconstructionFailedError("ab" * 28)
OWNER = ray.exceptions.OwnerDiedError("ab" * 28, None, "")
KILLED = ray.exceptions.OutOfMemoryError("Memory on the node was 27.5GB / 28.7GB.\nMore.")
GONE = ray.exceptions.ActorUnavailableError("rpc failed", None)


class Method:
    """Answers in turn, at last always the same; an exception is raised where it is waited for."""

    def __init__(self, answers: list[Any]):
        self.answers = answers
        self.asked: list[tuple[Any, ...]] = []

    def remote(self, *row: Any) -> Callable[[], Any]:
        self.asked.append(row)
        answer = self.answers[min(len(self.asked), len(self.answers)) - 1]

        def get() -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return get


class Handle:
    """Stands for an actor's handle."""

    def __init__(self, *fit: Any, ready: tuple[Any, ...] = (True,)):
        self.fit = self.begin = Method(list(fit))
        self.__ray_ready__ = Method(list(ready))


class Class:
    """Stands for an actor's class: `make_pool` says what it makes."""

    def __init__(self, handles: list[Handle]):
        self._handles = iter(handles)

    def options(self, **_: Any) -> "Class":
        return self

    def remote(self, *_: Any) -> Handle:
        return next(self._handles)


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RayPool, list[str]]]:
    monkeypatch.setattr(ray, "get", lambda call: call())
    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def make(*handles: Handle) -> tuple[RayPool, list[str]]:
        monkeypatch.setattr(ray, "remote", lambda _: Class(list(handles)))
        notes: list[str] = []
        held = [describe_seats(few) for few in deal("abcdefgh", 3)]
        demand = Demand("client", len(handles), 1, 0)
        return RayPool(object, [()] * len(handles), demand, notes.append, holds=held), notes

    return make


@pytest.mark.parametrize(
    "loss", [LOST, RECONSTRUCTION, OWNER, KILLED, GONE], ids=lambda e: type(e).__name__
)
def test_an_answer_that_is_lost_is_asked_for_again(make_pool: Any, loss: Exception) -> None:
    other, handle = Handle("a"), Handle(loss, "b")
    row, notes = make_pool(other, handle)
    assert row.map("fit", [1, 2]) == ["a", "b"]
    assert (other.fit.asked, handle.fit.asked) == ([(1,)], [(2,), (2,)])
    assert [note.startswith("fit on actor 1 was lost and begun again (") for note in notes] == [
        True
    ]


def test_one_that_stays_lost_ends_the_run_in_words(make_pool: Any) -> None:
    row, notes = make_pool(Handle(LOST))
    with pytest.raises(FellrayError, match=f"fit: lost {TRIES} times, last: its answer") as told:
        row.map("fit")
    assert "`dmesg`" in str(told.value)
    assert "clients.slots" in str(told.value)
    assert len(notes) == TRIES - 1


def test_whoever_is_lost_is_not_ready(make_pool: Any) -> None:
    row, _ = make_pool(Handle(ready=(True, LOST)), Handle(), Handle(ready=(True, GONE)))
    assert row.ready() == [1]


def test_whoever_is_placed_already_is_counted(
    make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoscaler's time is over: what the servers have is not free for clients."""
    make_pool(Handle())
    monkeypatch.setattr(ray, "wait", lambda asked, **_: ([], asked))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    monkeypatch.setattr(ray, "kill", lambda *_, **__: None)
    demands = [Demand("server", 1, 1, 0), Demand("client", 1, 2, 0)]
    with pytest.raises(FellrayError, match="what fits: 1 of 1 server, 0 of 1 client"):
        RayPool(object, [()], demands[1], print, 1.0, demands[:1])


def test_a_server_whose_answer_is_lost_is_a_lost_server(make_pool: Any) -> None:
    make_pool()
    for loss in (LOST, KILLED, GONE):
        leave = RayRemote([Handle(loss)]).begin("run", 1, ("a",))
        with pytest.raises(StaleLease, match="a server was lost"):
            leave()


def raised(cause: Exception) -> Any:
    """As `ray.get` raises what an actor has raised."""
    text = f"Traceback (most recent call last):\n{type(cause).__name__}: {cause}"
    return ray.exceptions.RayTaskError("fit", text, cause, "ray::fit", 1, "1.2.3.4")


def test_what_an_actor_says_is_told(make_pool: Any) -> None:
    for cause in (FellrayError("a file: is not there"), StaleLease("begun again")):
        row, notes = make_pool(Handle(raised(cause).as_instanceof_cause()))
        with pytest.raises(type(cause), match=str(cause)) as told:
            row.map("fit")
        assert not isinstance(told.value, ray.exceptions.RayTaskError)
        assert notes == []


def test_what_is_lost_on_its_way_to_an_actor_replays_the_round(make_pool: Any) -> None:
    """The actor itself is there and would fail with the same message again."""
    error = raised(LOST).as_instanceof_cause()
    assert isinstance(error, ray.exceptions.ObjectLostError)
    handle = Handle(error)
    row, notes = make_pool(handle)
    with pytest.raises(StaleLease, match="lost on its way"):
        row.map("fit")
    assert (len(handle.fit.asked), notes) == (1, [])
    leave = RayRemote([Handle(error)]).begin("run", 1, ("a",))
    with pytest.raises(StaleLease, match="lost on its way"):
        leave()


def test_mistakes_of_ours_keep_their_traceback() -> None:
    for cause in (KeyError("x"), RuntimeError("shapes differ"), OSError(2, "no such file")):
        error = raised(cause)
        assert tell(error, "client", "client actor 0") is error


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "CUDA out of memory. Tried"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 8 bytes"), "enforce"),
        (OSError(12, "Cannot allocate memory"), "Cannot allocate memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUDA error"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_who_runs_out_of_memory_is_named(make_pool: Any, cause: Exception, said: str) -> None:
    error = raised(cause).as_instanceof_cause()
    row, notes = make_pool(Handle("a"), Handle(error))
    with pytest.raises(FellrayError) as told:
        row.map("fit")
    words = str(told.value)
    assert words.startswith("client actor 1 (3 clients, d to f) ran out of memory (")
    assert said in words
    assert "more" not in words.partition("):")[0]
    assert "clients.slots" in words
    assert "clients.per_actor" in words
    assert notes == []
    with pytest.raises(FellrayError) as told:
        RayRemote([Handle(error)]).begin("run", 1, ("a",))()
    assert str(told.value).startswith("server actor 0 ran out of memory (")
    assert "server.max_tokens" in str(told.value)


def test_a_cause_is_what_ray_says_beside_the_usual() -> None:
    died = ray.exceptions.ActorDiedError()
    assert name_cause(died) == "The actor died unexpectedly before finishing this task."
    died.error_msg += "\n\tclass_name: Client\n\tpid: 7\nThe worker was killed.\nMore."
    assert name_cause(died) == "The worker was killed."
    assert name_cause(GONE).startswith("The actor None is unavailable: rpc failed.")
    assert name_cause(KILLED).endswith("short of memory: Memory on the node was 27.5GB / 28.7GB.")
    init = ray.exceptions.ActorDiedError(raised(FellrayError("no model there")))
    assert name_cause(init) == "no model there"
