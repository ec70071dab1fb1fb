"""Capacity: what a probe measured, what a round has to do, what nodes have, how a run would fit.

Numbers and their names only. It must not know how anything was measured. Bytes and seconds.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A cost that grows with a count."""

    first: float
    """Of one."""
    further: float = 0.0
    """Of each further one."""

    def at(self, count: float) -> float:
        """Of so many, at least one."""
        return self.first + max(0.0, count - 1) * self.further

    @classmethod
    def through(cls, one: float, many: float, count: int) -> "Line":
        """From the cost of one and of `count`; never falling."""
        return cls(one, max(0.0, (many - one) / (count - 1)) if count > 1 else 0.0)


@dataclass(frozen=True)
class Probe:
    """What one client actor and one server were seen to need."""

    client_bytes: Line
    """Peak of a client actor's own memory, by clients that train side by side in it."""
    server_bytes: Line
    """Peak of the server's own memory, by clients in one batch."""
    client_gpu_bytes: Line
    """The same of the GPU; 0 where they have none."""
    server_gpu_bytes: Line
    waiting_client_bytes: float
    """In its actor, a client in memory that is not training at the moment."""
    waiting_server_bytes: float
    """The same at the server."""
    library_bytes: float
    """Code that all processes of a node share."""
    store_bytes: float
    """Frozen weights and the catalogue: once per node, in Ray's object store."""
    rest_bytes: float
    """The driver, and Ray's own processes where Ray is the driver's."""
    tokens: float
    """Of one client's step."""
    own_s: Line
    """Of a local step, the client actor's own work, by clients side by side."""
    served_s: Line
    """Of a local step, the wait for the server, by clients side by side."""
    mixing_s: Line
    """From the last update to the commit, by clients that took part."""
    user_own_s: float
    """A validated user: the client actor's own work."""
    user_served_s: float
    """A validated user: the wait for the server."""
    step_traffic: float
    """Bytes that cross in one client's step."""
    update_traffic: float
    """Bytes of one client's update, both ways."""
    user_traffic: float
    """Bytes that cross for one validated user."""


@dataclass(frozen=True)
class Workload:
    """What a round has to do."""

    clients: int
    """Registered."""
    asked: int
    """In one round."""
    steps: int
    """Local steps of a client in a round."""
    users: int
    """Validated when it is due, over all clients."""
    every: int
    """Validation is due every so many rounds."""
    parameters: int
    """That a client sends at a round's end."""


@dataclass(frozen=True)
class Node:
    """What a machine has for this run."""

    name: str
    cpus: float
    """That Ray gives out; infinite where Ray is the run's own and gives what is asked."""
    cores: int
    """That compute."""
    gpus: int
    memory_bytes: float
    """Free for the run."""
    gpu_bytes: float = 0.0
    """Memory of one GPU."""
    driver: bool = False
    """The driver is here."""


@dataclass(frozen=True)
class Share:
    """What a node may get of a run, at most."""

    node: str
    actors: int
    """Client actors."""
    per_gpu: int
    """Client actors on one GPU."""
    parts: dict[str, float]
    """What for -> bytes of memory."""
    gpu_bytes: float
    """Of a GPU's memory, on the fullest one."""
    node_bytes: float
    """What the node has."""

    @property
    def bytes(self) -> float:
        """Memory at its peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Layout:
    """A way to run that fits."""

    per_actor: int
    actors: int
    side_by_side: int
    """Clients that train at the same moment in one actor."""
    shares: tuple[Share, ...]
    training_s: float
    mixing_s: float
    validation_s: float
    """Of a round in which it is due."""
    round_s: float
    """On average."""
    bound: str
    """What the training of a round waits for."""
    training_bytes: float
    validation_bytes: float
    """Of a round in which it is due."""
    why: str
