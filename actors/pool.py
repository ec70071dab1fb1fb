"""Rows of actors, one call. The only file that knows how Ray places, loses and restarts actors, but
for what its errors say (`losses`).

`RayPool` and `InlinePool` are equals: the first makes a plain class an actor, the second uses it as
it is in this process, for tests and debugging.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from fellray.actors.losses import LOST, name_cause, tell, words_of
from fellray.actors.session import ray
from fellray.platform.errors import FellrayError
from fellray.platform.faults import Stop, decide
from fellray.platform.places import Demand, name_amounts, pack

START_S = 600.0
"""How long placed actors may take to load their model."""

RETURN_S = 180.0
"""How long a lost actor may take to be back where no node has to be brought for it."""

ANSWER_S = 5.0
"""Who has not answered by then is taken for lost where another can take its place."""

Note = Callable[[str], None]
"""Hears of losses, for the record."""


class Pool(Protocol):
    """A fixed row of actors."""

    def map(
        self, method: str, *columns: Sequence[Any], among: Sequence[int] | None = None
    ) -> list[Any]:
        """Call `method` on every actor, the i-th getting item i of each column; order is kept.

        A lost actor is restarted and asked again, and so is one whose answer was lost.

        Args:
            among: only these actors, in this order.
        """
        ...

    def ask(
        self, method: str, *columns: Sequence[Any], among: Sequence[int] | None = None
    ) -> Callable[[], list[Any]]:
        """As `map`, but the answers are waited for where they are called for."""
        ...

    def ready(self) -> list[int]:
        """Who answers now. All, where nobody does: then there is nothing but to wait for them."""
        ...

    def close(self) -> None:
        """End the actors."""
        ...


class InlinePool:
    """The same classes in this process, one after the other."""

    def __init__(self, cls: Callable[..., Any], args: Sequence[tuple[Any, ...]]):
        self.members = [cls(*a) for a in args]

    def map(
        self, method: str, *columns: Sequence[Any], among: Sequence[int] | None = None
    ) -> list[Any]:
        """See `Pool`."""
        members = self.members if among is None else [self.members[i] for i in among]
        rows = zip(*columns, strict=True) if columns else [()] * len(members)
        return [getattr(m, method)(*row) for m, row in zip(members, rows, strict=True)]

    def ready(self) -> list[int]:
        """See `Pool`."""
        return list(range(len(self.members)))

    def ask(
        self, method: str, *columns: Sequence[Any], among: Sequence[int] | None = None
    ) -> Callable[[], list[Any]]:
        """See `Pool`."""
        answers = self.map(method, *columns, among=among)
        return lambda: answers

    def close(self) -> None:
        """See `Pool`."""
        self.members.clear()


def check_places(demands: Sequence[Demand], waited_s: float = 0.0) -> None:
    """See that all actors fit on the nodes that exist.

    Args:
        waited_s: how long an autoscaler has had to bring nodes.

    Raises:
        FellrayError: says what was asked, what exists and what would fit.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    placed = pack(demands, nodes)
    if any(placed[d.name] < d.count for d in demands):
        raise FellrayError(_no_place(demands, placed, nodes, waited_s))


class Shared:
    """A value that lies once per node in the object store, read-only, however many actors use it.

    Among an actor's constructor arguments it stands for the value, also when the actor is
    restarted: the reference travels as bytes, which keeps the value alive as long as this process.
    Values of one name are put there once.
    """

    _put: ClassVar[dict[tuple[str, str], bytes]] = {}

    def __init__(self, name: str, value: Any):
        # a Ray that ended took its objects along
        key = (ray.get_runtime_context().gcs_address, name)
        if key not in self._put:
            self._put[key] = ray.cloudpickle.dumps(ray.put(value))
        self._reference = self._put[key]

    def get(self) -> Any:
        """The value; arrays in it are not copied."""
        return ray.get(ray.cloudpickle.loads(self._reference))


def _fetching(cls: type) -> type:
    """The same class, with `Shared` constructor arguments replaced by their values."""

    class Fetching(cls):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self, *args: Any):
            super().__init__(*(a.get() if isinstance(a, Shared) else a for a in args))

    Fetching.__name__ = Fetching.__qualname__ = cls.__name__
    return Fetching


class RayPool:
    """Ray actors, restarted for ever under the same handle; what they were is on storage."""

    def __init__(
        self,
        cls: type,
        args: Sequence[tuple[Any, ...]],
        demand: Demand,
        note: Note,
        wait_s: float = 0.0,
        beside: Sequence[Demand] = (),
        holds: Sequence[str] = (),
    ):
        """Places the actors and waits until all have started.

        Args:
            wait_s: how long an autoscaler may take to bring nodes for actors that have no place,
                now, and for one that was lost with its node.
            beside: rows that have their places already.
            holds: what each actor is there for, in words.

        Raises:
            FellrayError: an actor finds no place, or cannot start.
        """
        self._note = note
        self._row, self._holds = demand.name, holds
        self._wait_s = wait_s
        remote = ray.remote(_fetching(cls)).options(
            num_cpus=demand.cpus, num_gpus=demand.gpus, max_restarts=-1, max_task_retries=0
        )
        self.handles = [remote.remote(*a) for a in args]
        try:
            self._await_start(demand, beside)
        except BaseException:
            self.close()
            raise

    def map(
        self, method: str, *columns: Sequence[Any], among: Sequence[int] | None = None
    ) -> list[Any]:
        """See `Pool`."""
        return self.ask(method, *columns, among=among)()

    def ask(
        self, method: str, *columns: Sequence[Any], among: Sequence[int] | None = None
    ) -> Callable[[], list[Any]]:
        """See `Pool`."""
        asked = range(len(self.handles)) if among is None else among
        rows = list(zip(*columns, strict=True)) if columns else [()] * len(asked)
        calls = [
            getattr(self.handles[i], method).remote(*row)
            for i, row in zip(asked, rows, strict=True)
        ]
        return lambda: [
            self._result(i, method, row, call)
            for i, row, call in zip(asked, rows, calls, strict=True)
        ]

    def ready(self) -> list[int]:
        """See `Pool`."""
        everyone = list(range(len(self.handles)))
        if len(everyone) == 1:
            return everyone  # nobody could take its place
        asked = [handle.__ray_ready__.remote() for handle in self.handles]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
        ready = [i for i, ping in enumerate(asked) if ping in answered and _is_there(ping)]
        return ready or everyone

    def close(self) -> None:
        """See `Pool`."""
        for handle in self.handles:
            ray.kill(handle, no_restart=True)

    def _result(self, index: int, method: str, row: tuple[Any, ...], call: Any) -> Any:
        tries = 1
        while True:
            try:
                return ray.get(call)
            except ray.exceptions.RayTaskError as error:
                raise tell(error, self._row, self._name(index)) from None
            except LOST as error:
                lost = error
            reason = name_cause(lost)
            decision = decide(tries, getattr(lost, "actor_init_failed", False), reason)
            if isinstance(decision, Stop):
                raise FellrayError(f"{method}: {decision.reason}; `fellray train` resumes the run")
            self._note(f"{method} on actor {index} was lost and begun again ({reason})")
            time.sleep(decision.pause_s)
            if not self._await_return(index):
                raise FellrayError(
                    f"{method}: actor {index} was lost and is not back after "
                    f"{max(self._wait_s, RETURN_S):.0f} s ({reason}); `fellray train` resumes the "
                    "run when there is room for it"
                )
            tries += 1
            call = getattr(self.handles[index], method).remote(*row)

    def _name(self, index: int) -> str:
        held = f" ({self._holds[index]})" if self._holds else ""
        return f"{self._row} actor {index}{held}"

    def _await_return(self, index: int) -> bool:
        """Whether a lost actor, whose calls fail meanwhile, is back in time. It loads its model
        again, and may wait for a node as long as a new one does."""
        deadline = time.monotonic() + max(self._wait_s, RETURN_S)
        while time.monotonic() < deadline:
            try:
                ray.get(self.handles[index].__ray_ready__.remote())
                return True
            except ray.exceptions.ActorUnavailableError:
                time.sleep(0.5)
            except LOST:
                return True  # it is gone for good: the next call says why
        return False

    def _await_start(self, demand: Demand, beside: Sequence[Demand]) -> None:
        started = [handle.__ray_ready__.remote() for handle in self.handles]
        _, waiting = ray.wait(started, num_returns=len(started), timeout=self._wait_s)
        if waiting and self._wait_s:
            check_places([*beside, demand], self._wait_s)
        _, waiting = ray.wait(started, num_returns=len(started), timeout=START_S)
        if waiting:
            raise FellrayError(
                f"{len(waiting)} of {demand.count} {demand.name} actors did not start within "
                f"{START_S:.0f} s; each asks for {demand.needs}, and free now is "
                f"{name_amounts(ray.available_resources())}: end other jobs or ask for less"
            )
        for index, reference in enumerate(started):
            try:
                ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.RayTaskError) as error:
                reason = words_of(error)
                raise FellrayError(f"{demand.name} actor {index} cannot start: {reason}") from None


def _is_there(ping: Any) -> bool:
    try:
        ray.get(ping)
    except LOST:
        return False
    return True


def _no_place(
    demands: Sequence[Demand],
    placed: Mapping[str, int],
    nodes: Sequence[Mapping[str, float]],
    waited_s: float,
) -> str:
    asked = "; ".join(f"{d.count} {d.name} actors of {d.needs}" for d in demands)
    exists = " + ".join(name_amounts(node) for node in nodes)
    more = (
        f"give the autoscaler longer than the {waited_s:g} s that it had, or larger node types to "
        "bring (cluster.wait_for_nodes_s)"
        if waited_s
        else "let an autoscaler bring nodes (cluster.wait_for_nodes_s)"
    )
    fits = ", ".join(f"{placed[d.name]} of {d.count} {d.name}" for d in demands)
    return (
        f"no place for all actors: asked {asked}; the cluster's nodes have {exists}; "
        f"what fits: {fits}. Put more clients into an actor (clients.per_actor), ask for less "
        f"(clients.cpus, clients.gpu_denominator, server.cpus, server.gpus), or {more}"
    )
