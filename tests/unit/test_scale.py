"""The sweep without a cluster: its layouts, its split of a round, its crowd, its node-seconds."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from fellray.jobs import node_watch
from fellray.jobs.layouts import Layout, configure, draw_dry, list_layouts, read_layouts
from fellray.jobs.node_watch import NodeWatch, name_kind
from fellray.jobs.timed_plant import ClientTimes, ServerTimes, split_round
from fellray.platform.errors import FellrayError


def test_layouts_that_make_no_sense_become_those_that_do() -> None:
    assert list_layouts([4, 100], [10], [3, 8], [3]) == [
        Layout(4, 4, 2, 2),  # three actors of two clients: two do
        Layout(4, 4, 4, 3),
        Layout(100, 10, 3, 3),
        Layout(100, 10, 8, 3),
    ]


def test_lists_are_numbers() -> None:
    lists = {"registered": "10, 20", "sampled": "5", "actors": "2", "nodes": "1"}
    assert read_layouts(**lists) == [Layout(10, 5, 2, 1), Layout(20, 5, 2, 1)]
    for bad in ("ten", "0", "", "3,,4"):
        with pytest.raises(FellrayError, match="--actors"):
            read_layouts(**{**lists, "actors": bad})


@pytest.mark.parametrize(("actors", "nodes"), [(3, 3), (6, 2), (7, 3)])
def test_a_layout_takes_its_nodes(actors: int, nodes: int, tmp_path: Path) -> None:
    layout = Layout(7 * actors, 5, actors, nodes)
    config = configure(tmp_path, layout, 3, 2, ["train.batch_size=4"])
    assert config.train.batch_size == 4
    assert config.clients.per_actor == 7
    fits = int(2 / config.clients.cpus + 1e-9)
    assert fits * nodes >= actors > fits * (nodes - 1)


def test_a_dry_crowd_is_placed(tmp_path: Path) -> None:
    layout = Layout(60, 10, 6, 2)
    found = draw_dry(configure(tmp_path, layout, 3, 2, []), 1001, layout, 2)
    assert (found["actors"], found["per_actor"], found["placed"]) == (6, 167, 6)
    assert found["draw_s"] > 0


def test_the_parts_of_a_round_add_up() -> None:
    clients = [ClientTimes(4.0, 3.0, 100), ClientTimes(2.0, 1.0, 100), ClientTimes(0.0, 0.0, 100)]
    server = ServerTimes(stayed=3.0, worked=2.0, calls=[2, 1], tokens=[20, 10])
    split = split_round(5.0, clients, server)
    assert asdict(split) == {
        "seconds": 5.0,
        "own": 1.0,
        "trunk": 1.0,
        "transfer": 0.5,
        "queue": 0.5,
        "slowest": 1.0,
        "driver": 1.0,
    }
    assert sum(asdict(split).values()) == 2 * split.seconds
    assert split_round(5.0, [], ServerTimes()).driver == 5.0


def test_node_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_watch, "count_nodes", lambda: Counter(head=1))
    watch = NodeWatch()
    watch.changes = [
        (100.0, Counter(head=1)),
        (110.0, Counter(head=1, client=2)),
        (130.0, Counter(head=1)),
    ]
    assert watch.seconds(100, 140) == {"head": 40.0, "client": 40.0}
    assert watch.seconds(105, 115) == {"head": 10.0, "client": 10.0}
    assert watch.reached(3) == 110.0
    assert watch.reached(4) is None
    assert watch.await_count(1, 1.0) is not None
    assert watch.await_count(0, 0.3) is None


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([Counter(head=1), Counter(head=1, client=1)])

    def count() -> Counter[str]:
        if (answer := next(answers, None)) is None:
            raise RuntimeError("no head")
        return answer

    monkeypatch.setattr(node_watch, "count_nodes", count)
    monkeypatch.setattr(node_watch, "EVERY_S", 0.01)
    with NodeWatch() as watch:
        with pytest.raises(FellrayError, match=r"which nodes it has \(no head\)"):
            watch.await_count(0, 5.0)
        assert watch.reached(2) is not None
        with pytest.raises(FellrayError, match="no head"):
            watch.seconds(0, 1)


def test_kinds_of_nodes() -> None:
    assert name_kind({"Resources": {"CPU": 1.0}, "Labels": {"fellray": "server"}}) == "server"
    assert name_kind({"Resources": {"CPU": 1.0}, "Labels": {}}) == "client"
    assert name_kind({"Resources": {"node:__internal_head__": 1.0}}) == "head"
