"""What was asked for lately stays, the rest leaves."""

from fellray.serve.recent import Recent


def test_who_was_asked_for_longest_ago_leaves_first() -> None:
    recent: Recent[list[int]] = Recent(2)
    assert recent.find("a") is None
    for name in "ab":
        assert recent.keep(name, [1]) == [1]
    assert recent.find("a") == [1]
    recent.keep("c", [])
    assert [recent.find(name) for name in "abc"] == [[1], None, []]
    recent.keep("a", [2])
    assert (recent.find("a"), len(recent)) == ([2], 2)
    recent.clear()
    assert len(recent) == 0
