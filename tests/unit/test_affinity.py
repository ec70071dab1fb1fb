"""Who asks which server."""

from hypothesis import given
from hypothesis import strategies as st

from fellray.platform.affinity import assign


def test_neighbours_have_the_same_home() -> None:
    assert assign(7, 3, range(3)) == [0, 0, 0, 1, 1, 2, 2]
    assert assign(3, 3, range(3)) == [0, 1, 2]
    assert assign(4, 1, [0]) == [0, 0, 0, 0]


def test_only_who_lost_its_server_moves() -> None:
    assert assign(7, 3, [0, 2]) == [0, 0, 0, 0, 2, 2, 2]
    assert assign(7, 3, [1]) == [1] * 7


@given(st.data())
def test_homes_and_moves_are_even(data: st.DataObject) -> None:
    actors = data.draw(st.integers(1, 60))
    servers = data.draw(st.integers(1, actors))
    ready = data.draw(st.sets(st.integers(0, servers - 1), min_size=1))
    homes, placed = assign(actors, servers, range(servers)), assign(actors, servers, ready)
    sizes = [homes.count(server) for server in range(servers)]
    assert max(sizes) - min(sizes) <= 1
    assert set(placed) == ready
    assert all(a == b for a, b in zip(homes, placed, strict=True) if a in ready)
    extra = [placed.count(server) - homes.count(server) for server in ready]
    assert max(extra) - min(extra) <= 1
