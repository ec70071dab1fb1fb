"""How a run would lie on nodes: exact numbers, and what is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform import config as configs
from fellray.platform.capacity import Line, Node, Probe, Workload
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.layout import MARGIN, lay_out

MIB, GIB = 2**20, 2**30
PROBE = Probe(
    client_bytes=Line(500 * MIB, 20 * MIB),
    server_bytes=Line(700 * MIB, 30 * MIB),
    client_gpu_bytes=Line(0.0),
    server_gpu_bytes=Line(0.0),
    waiting_client_bytes=1 * MIB,
    waiting_server_bytes=2 * MIB,
    library_bytes=200 * MIB,
    store_bytes=100 * MIB,
    rest_bytes=800 * MIB,
    tokens=1000,
    own_s=Line(0.5, 0.25),
    served_s=Line(0.25, 0.125),
    mixing_s=Line(0.1, 0.01),
    user_own_s=0.02,
    user_served_s=0.01,
    step_traffic=1 * MIB,
    update_traffic=2 * MIB,
    user_traffic=1000,
)
WORK = Workload(clients=8, asked=8, steps=4, users=80, every=2, parameters=0)
HERE = Node("here", math.inf, cores=4, gpus=0, memory_bytes=64 * GIB, driver=True)


def config(**clients: Any) -> RunConfig:
    server = {"max_tokens": 3000, "threads": 1, "cpus": 1}
    return configs.parse({"clients": clients, "server": server}, "test")


def test_a_line_goes_through_what_was_measured_and_never_falls() -> None:
    line = Line.through(10, 16, 4)
    assert (line.at(1), line.at(4), line.at(7)) == (10, 16, 22)
    assert line.at(0) == 10
    assert Line.through(10, 7, 4) == Line(10, 0)
    assert Line.through(10, 10, 1) == Line(10, 0)


def test_every_number_of_a_layout() -> None:
    layout = lay_out(config(per_actor=4, slots=2), PROBE, WORK, [HERE])
    assert (layout.per_actor, layout.actors, layout.side_by_side) == (4, 2, 2)
    (share,) = layout.shares
    assert share.node == "here"
    assert share.actors == 2
    assert {name: size / MIB for name, size in share.parts.items()} == {
        # the store, 8 updates, a step of 2 actors with 2 side by side
        "weights, catalogue and messages": 100 + 8 * 2 + 2 * 2 * 1,
        "shared code": 200,
        # and matrices of 8 by 8
        "driver and Ray": 800 + 6 * 8 * 64 / MIB,
        # a batch of 3 clients, five wait
        "server": 700 + 2 * 30 + 5 * 2,
        # two train, two wait, each
        "2 client actors": 2 * (500 + 20 + 2 * 1),
    }
    assert share.bytes == sum(share.parts.values())
    # two waves of two, four steps each; two actors keep the server half busy
    own, served = 4 * (2 * 0.5 + 2 * 0.25), 4 * (2 * 0.25 + 2 * 0.125)
    assert layout.training_s == own + served == 9
    assert "one actor's clients" in layout.bound
    assert layout.mixing_s == pytest.approx(0.1 + 7 * 0.01)
    assert layout.validation_s == pytest.approx(40 * 0.03)
    assert layout.round_s == pytest.approx(9 + 0.17 + 0.6)
    assert layout.training_bytes == 8 * (4 + 2) * MIB
    assert layout.validation_bytes == 80_000


@pytest.mark.parametrize(
    ("own", "served", "cores", "bound", "seconds"),
    [
        pytest.param(1.0, 0.5, 4, "one actor's clients", 4 * 1.5, id="chain"),
        pytest.param(0.25, 1.0, 8, "the server", 8 * 4 * 1.0, id="server"),
        pytest.param(1.0, 0.125, 2, "the cores", 8 * 4 * 1.125 / 2, id="cores"),
    ],
)
def test_what_training_waits_for(
    own: float, served: float, cores: int, bound: str, seconds: float
) -> None:
    few = replace(WORK, clients=2, asked=2) if bound.startswith("one") else WORK
    probe = replace(PROBE, own_s=Line(own), served_s=Line(served))
    layout = lay_out(config(per_actor=1), probe, few, [replace(HERE, cores=cores)])
    assert layout.bound.startswith(bound)
    assert layout.training_s == seconds


def test_auto_takes_the_shortest_rounds_and_of_equal_ones_the_fewest_processes() -> None:
    quick = replace(PROBE, served_s=Line(0.0), user_served_s=0.0)
    layout = lay_out(config(per_actor="auto"), quick, WORK, [HERE])
    assert (layout.per_actor, layout.actors) == (2, 4)
    assert "4 ways" in layout.why
    # all work is the server's: more actors gain nothing
    slow = replace(PROBE, own_s=Line(0.0), served_s=Line(1.0, 1.0), user_own_s=0.0)
    assert lay_out(config(per_actor="auto"), slow, WORK, [HERE]).actors == 1


def test_auto_takes_what_the_memory_holds() -> None:
    quick = replace(PROBE, served_s=Line(0.0), user_served_s=0.0)
    whole = lay_out(config(per_actor=4), quick, WORK, [HERE]).shares[0].bytes
    tight = replace(HERE, memory_bytes=whole * MARGIN)
    layout = lay_out(config(per_actor="auto"), quick, WORK, [tight])
    assert layout.actors == 2
    assert "2 of them do not fit" in layout.why


def test_a_refusal_says_what_was_asked_what_exists_and_what_fits() -> None:
    tight = replace(HERE, memory_bytes=4.5 * GIB)
    with pytest.raises(FellrayError) as refusal:
        lay_out(config(per_actor=1), PROBE, WORK, [tight])
    words = str(refusal.value)
    assert "asked clients.per_actor=1 clients.slots=64 for 8 clients, 8 in a round" in words
    assert "here has 4.50 GiB of memory free" in words
    assert "8 client actors 3.91 GiB" in words
    assert "clients.per_actor=3 would fit" in words
    assert lay_out(config(per_actor=3), PROBE, WORK, [tight]).actors == 3
    with pytest.raises(FellrayError):
        lay_out(config(per_actor=2), PROBE, WORK, [tight])


def test_fewer_side_by_side_where_no_dealing_helps() -> None:
    heavy = replace(PROBE, client_bytes=Line(500 * MIB, 400 * MIB))
    tight = replace(HERE, memory_bytes=5 * GIB)
    with pytest.raises(FellrayError, match=r"clients.per_actor=8 clients.slots=4 would fit"):
        lay_out(config(per_actor=8), heavy, WORK, [tight])
    lay_out(config(per_actor=8, slots=4), heavy, WORK, [tight])
    with pytest.raises(FellrayError, match="use larger nodes"):
        lay_out(config(per_actor="auto"), heavy, WORK, [replace(HERE, memory_bytes=GIB)])


def gpu_node(name: str = "g0", gpus: int = 1, **more: Any) -> Node:
    node = Node(name, 16, 16, gpus, 64 * GIB, gpu_bytes=20 * GIB, driver=name == "g0")
    return replace(node, **more)


def test_a_gpu_holds_n_actors_of_one_nth() -> None:
    probe = replace(PROBE, client_gpu_bytes=Line(3 * GIB, 0.25 * GIB))
    layout = lay_out(config(per_actor=2, gpu_denominator=4), probe, WORK, [gpu_node()])
    (share,) = layout.shares
    assert (share.actors, share.per_gpu) == (4, 4)
    assert share.gpu_bytes == 4 * 3.25 * GIB
    with pytest.raises(FellrayError) as refusal:
        lay_out(config(per_actor=1, gpu_denominator=8), probe, WORK, [gpu_node()])
    words = str(refusal.value)
    assert "a GPU that holds 8 client actors needs about 30.00 GiB" in words
    assert "and has 20.00 GiB" in words
    assert "clients.per_actor=2 would fit" in words


def on_gpus(server: float, **clients: Any) -> RunConfig:
    made = config(**clients)
    return made.model_copy(update={"server": made.server.model_copy(update={"gpus": server})})


def test_a_server_alone_on_its_gpu_is_weighed_too() -> None:
    """Three clients in a batch: 1 GiB and twice 0.5."""
    probe = replace(PROBE, server_gpu_bytes=Line(1 * GIB, 0.5 * GIB))
    asked = on_gpus(1, per_actor=2)
    (share,) = lay_out(asked, probe, WORK, [gpu_node(gpu_bytes=2.5 * GIB)]).shares
    assert (share.per_gpu, share.gpu_bytes) == (0, 2 * GIB)
    with pytest.raises(FellrayError, match=r"a GPU that holds 1 server needs about 2.50 GiB"):
        lay_out(asked, probe, WORK, [gpu_node(gpu_bytes=2.4 * GIB)])


@pytest.mark.parametrize(
    ("server", "needed"),
    [
        pytest.param(1.0, 4 * 3, id="a server that fills its GPU has no client beside it"),
        pytest.param(0.5, 2 + 2 * 3, id="half a GPU is left for two"),
        pytest.param(0.25, 2 * 2 + 2 * 3, id="two servers and two clients"),
    ],
)
def test_a_gpu_holds_what_ray_may_put_there_together(server: float, needed: float) -> None:
    probe = replace(PROBE, server_gpu_bytes=Line(2 * GIB), client_gpu_bytes=Line(3 * GIB))
    asked = on_gpus(server, per_actor=2, gpu_denominator=4)
    if server == 0.25:
        asked = asked.model_copy(update={"server": asked.server.model_copy(update={"count": 2})})
    gpus = 2 if server == 1 else 1
    work = WORK if server == 1 else replace(WORK, clients=4, asked=4)
    (share,) = lay_out(asked, probe, work, [gpu_node(gpus=gpus)]).shares
    assert share.gpu_bytes == needed * GIB


def test_servers_and_clients_find_places_together() -> None:
    """Each node alone has room for four clients; one of the eight has the server's place."""
    nodes = [gpu_node(name, 0, cpus=4) for name in ("g0", "g1")]
    with pytest.raises(FellrayError) as refusal:
        lay_out(config(per_actor=1, cpus=1), PROBE, WORK, nodes)
    words = str(refusal.value)
    assert "beside the server the nodes have places for 7 of 8 client actors" in words
    assert "clients.per_actor=2 would fit" in words
    seven = replace(WORK, clients=7, asked=7)
    shares = lay_out(config(per_actor=1, cpus=1), PROBE, seven, nodes).shares
    # memory is counted for the worst: the server on either
    assert [(share.actors, "server" in share.parts) for share in shares] == [(4, True)] * 2


def test_a_third_of_a_gpu_fits_three_times() -> None:
    probe = replace(PROBE, client_gpu_bytes=Line(3 * GIB))
    work = replace(WORK, clients=6, asked=6)
    shares = lay_out(config(per_actor=1, gpu_denominator=3), probe, work, [gpu_node(gpus=2)]).shares
    assert (shares[0].actors, shares[0].per_gpu) == (6, 3)
    more = replace(work, clients=7, asked=7)
    with pytest.raises(FellrayError, match=r"places for 6 of 7 .* clients.per_actor=2 would fit"):
        lay_out(config(per_actor=1, gpu_denominator=3), probe, more, [gpu_node(gpus=2)])


def test_every_node_holds_the_most_that_ray_may_put_there() -> None:
    """16 CPUs let Ray put all 20 actors of half a CPU on one of two nodes."""
    work = replace(WORK, clients=20, asked=20)
    nodes = [gpu_node("a", 0, memory_bytes=12 * GIB), gpu_node("b", 0, memory_bytes=12 * GIB)]
    with pytest.raises(FellrayError) as refusal:
        lay_out(config(per_actor=1), PROBE, work, nodes)
    assert "up to 20 client actors" in str(refusal.value)
    assert "clients.per_actor=2 would fit" in str(refusal.value)
    shares = lay_out(config(per_actor=1, cpus=1.25), PROBE, work, nodes).shares
    assert [share.actors for share in shares] == [12, 12]
    assert all("server" in share.parts for share in shares)


def test_more_cpus_for_each_where_dealing_anew_does_not_help() -> None:
    heavy = replace(PROBE, waiting_client_bytes=2 * GIB, client_bytes=Line(2 * GIB, 2 * GIB))
    work = replace(WORK, clients=4, asked=4)
    nodes = [gpu_node("a", 0, memory_bytes=11 * GIB), gpu_node("b", 0, memory_bytes=11 * GIB)]
    with pytest.raises(FellrayError, match=r"clients.cpus=(\S+) would fit: Ray puts at most 3"):
        lay_out(config(per_actor=1), heavy, work, nodes)
    lay_out(config(per_actor=1, cpus=4.01), heavy, work, nodes)


def test_no_place_for_the_server() -> None:
    with pytest.raises(FellrayError, match="no node has a place for the server"):
        lay_out(config(per_actor=8), PROBE, WORK, [gpu_node(cpus=0.5, gpus=0)])


def test_several_servers_share_the_clients_and_the_batches() -> None:
    made = config(per_actor=2, slots=2)
    two = made.model_copy(update={"server": made.server.model_copy(update={"count": 2})})
    slow = replace(PROBE, served_s=Line(4.0))
    one_layout, layout = (lay_out(c, slow, WORK, [HERE]) for c in (made, two))
    assert (one_layout.bound, layout.bound) == ("the server, one batch after the other",) * 2
    assert layout.training_s == one_layout.training_s / 2
    # each: four of eight clients, three of them in a batch
    assert layout.shares[0].parts["2 servers"] / MIB == 2 * (700 + 2 * 30 + 1 * 2)
    with pytest.raises(FellrayError, match="1 client actors cannot use 2 servers"):
        lay_out(
            two.model_copy(update={"clients": config(per_actor=8).clients}), PROBE, WORK, [HERE]
        )
    with pytest.raises(FellrayError, match="places for 1 of 2 servers"):
        lay_out(two, PROBE, WORK, [gpu_node(cpus=1.5, gpus=0)])


@given(
    clients=st.integers(1, 3000),
    asked=st.integers(1, 3000),
    slots=st.integers(1, 128),
    memory=st.integers(2, 200),
    cores=st.integers(1, 64),
)
def test_auto_fits_whatever_it_chooses(
    clients: int, asked: int, slots: int, memory: int, cores: int
) -> None:
    work = replace(WORK, clients=clients, asked=min(asked, clients), parameters=1000)
    node = replace(HERE, memory_bytes=memory * GIB, cores=cores)
    try:
        layout = lay_out(config(per_actor="auto", slots=slots), PROBE, work, [node])
    except FellrayError:
        return
    assert layout.actors == -(-clients // layout.per_actor)
    assert layout.shares[0].bytes * MARGIN <= node.memory_bytes
    again = lay_out(config(per_actor=layout.per_actor, slots=slots), PROBE, work, [node])
    assert replace(again, why=layout.why) == layout
