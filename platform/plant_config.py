"""What a run can be told of its plant: client and server actors, their Ray, what crosses between.

It must not know what is trained, nor how actors are made.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fellray.platform.section import Section


class WireConfig(Section):
    """In what form hidden states and gradients cross the cut (docs/performance.md, Bytes)."""

    activation: Literal["float32", "int8", "int4"] = "float32"
    """Hidden states, both ways. int8: 8 bits a number, a scale for each token; int4: 4 bits, a
    scale for 64 numbers. Evaluation and serving see the same rounded numbers."""
    gradient: Literal["float32", "int8", "int4"] = "float32"
    """Their gradients, both ways; rounded up or down at random, so that they are right on average.
    The draws follow from seed, client, round and step alone."""
    pooled: bool = False
    """Only with `model.top=0`: the server takes the mean over a history's tokens, all that the top
    looks at; one vector comes back and one gradient goes up, in int8 where tokens cross in fewer
    bits. In float32 the same bits as without."""
    keep_rows_mib: int = Field(default=0, ge=0)
    """Memory in one server for clients' hidden states at the lower cut. What is held is not sent
    again: not for the backward pass, and with `model.freeze_bottom` in no later step, round or
    evaluation. Beyond it the longest unused go, and are sent again. It decides no bit. With a
    frozen bottom the server keeps, while the run lasts, what may be inverted to texts. 0: none."""


def _count_or_auto(value: Any) -> Any:
    """One message for what is neither."""
    try:
        if value == "auto" or int(value) == float(value) >= 1:
            return value
    except (TypeError, ValueError):
        pass
    raise ValueError("write a number of clients, 1 or more, or auto")


class ClientsConfig(Section):
    """Client actors: how many clients each holds and what it may use of a node."""

    per_actor: Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)] = 1
    """Clients in one actor. 1: every client is a process of its own (about 600 MiB). `auto`: a
    probe measures memory and time before the run, as `fellray plan` does; the run records the
    number."""
    slots: int = Field(default=64, ge=1)
    """How many of an actor's clients train side by side; the others who take part follow."""
    crews: int = Field(default=2, ge=1)
    """Those who train side by side do so in as many crews, turn about: while one crew's rows are in
    the trunk, another works in the actor. Decides no bit. 1: the actor waits for the trunk."""
    cpus: float = Field(default=0.5, ge=0)
    """CPUs Ray reserves for one client actor."""
    gpu_denominator: int = Field(default=0, ge=0)
    """n: one client actor takes 1/n of a GPU. 0: none."""
    threads: int = Field(default=1, ge=1)
    """Threads torch uses in a client actor. Recorded, because it decides the bits."""
    own: Path | None = None
    """A Parquet or CSV file of clients that differ, with the columns client (text) and some of
    `rank`, `local_samples`, `cut`: whole numbers of 1 or more (a cut may be 0), empty for the
    run's. `model.lora.r` is the largest rank. A learner who reads several clients' data has that
    rank and the run's cut, and reads what all of them together do. Blocks that some hold themselves
    and others at the server are mixed by their name, wherever they are held; so cuts go with
    `train.share` all, or none."""

    @property
    def together(self) -> int:
        """`per_actor` as a number; whoever starts actors has settled `auto` before."""
        assert self.per_actor != "auto", "per_actor is not settled"
        return self.per_actor


class ServerConfig(Section):
    """The server actors that run the trunk."""

    count: int = Field(default=1, ge=1)
    """How many. Each serves the clients of some actors; when one is lost, the others take over its
    actors until it is back. Decides no bit of a personal adapter."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Who backpropagates through the trunk."""
    zero_stage: Literal[1] = 1
    """DeepSpeed's ZeRO stage (world size 1)."""
    shared_adapter: bool = False
    """Also train one trunk adapter shared by all clients, under DeepSpeed's optimizer."""
    shared_learning_rate: float = Field(default=1e-3, gt=0)
    """Learning rate of the shared trunk adapter, stepped once per round."""
    max_tokens: int = Field(default=16384, ge=16)
    """Most tokens in one merged batch; rows of one client and step always stay together."""
    keep_graphs_mib: int = Field(default=512, ge=0)
    """Memory for what forward passes leave for their backward; beyond it the oldest are dropped and
    made again, with the same bits. 0: every forward is computed twice, nothing is kept."""
    cache_mib: int = Field(default=256, ge=0)
    """Memory for keys and values of texts that a generative model is writing; beyond it the longest
    unused are dropped, and their clients send them again whole. 0: every token costs its whole
    text."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In what the trunk computes. Messages, adapters, their gradients and moments stay float32.
    bfloat16 is for GPUs (and CPUs with bfloat16 products); elsewhere it is slower."""
    cpus: float = Field(default=1, ge=0)
    """CPUs Ray reserves for one server."""
    gpus: float = Field(default=0, ge=0)
    """GPUs Ray reserves for one server."""
    threads: int = Field(default=2, ge=1)
    """Threads torch uses in one server."""


class ClusterConfig(Section):
    """Which Ray the actors run on."""

    address: str = "local"
    """`local` starts a Ray of its own on this machine; `auto` joins the one that runs here, as a
    job under `ray job submit` does anyway."""
    wait_for_nodes_s: float = Field(default=0.0, ge=0)
    """Seconds that an autoscaler has to bring nodes for actors that find no place, and for one that
    was lost with its node. 0: a layout that does not fit on the nodes there are is refused."""
