"""Kept passes: whole or in parts, of one forward or several, never beyond the budget."""

import torch
from torch import Tensor

from fellray.platform.keep import Keep, measure
from fellray.platform.lanes import Lanes
from fellray.platform.packed import Saved


def lay(*sizes: int) -> Lanes:
    return Lanes(torch.tensor(sizes), torch.arange(len(sizes)), 16, torch.full((len(sizes),), 8))


def made(lanes: Lanes, value: float) -> tuple[Tensor, list[Saved]]:
    """A pass whose numbers say whose they are; lane i of `lanes` holds value + i."""
    h = torch.cat(
        [torch.full((stop - start, 2), value + i) for i, (start, stop) in enumerate(lanes.spans())]
    )
    return h, [Saved(*(h * 10**at for at in range(7))) for _ in range(2)]


def test_a_whole_pass_comes_back_without_a_copy() -> None:
    keep, lanes = Keep(10_000), lay(16, 16, 24)
    h, saved = made(lanes, 1.0)
    assert keep.make_room(measure(saved))
    keep.put("abc", lanes, saved)
    assert keep.used == measure(saved) == 56 * 2 * 4 * 7 * 2
    found = keep.take("abc", lanes, h)
    assert found is not None
    assert all(a is b for a, b in zip(found, saved, strict=True))
    assert keep.used == 0
    assert keep.take("abc", lanes, h) is None, "taken once"


def test_parts_of_several_passes() -> None:
    keep = Keep(100_000)
    for keys, value in (("ab", 1.0), ("cd", 5.0)):
        lanes = lay(16, 16)
        keep.put(keys, lanes, made(lanes, value)[1])
    held, wanted = keep.used, lay(16, 16)
    h = torch.cat([torch.full((16, 2), 6.0), torch.full((16, 2), 1.0)])
    found = keep.take("da", wanted, h)
    assert found is not None
    assert torch.equal(found[1].end_Md, h * 10**6)
    assert keep.used == held, "what is left of a pass still holds its memory"
    assert keep.take("b", lay(16), torch.full((16, 2), 2.0)) is not None
    assert keep.used == held // 2


def test_the_oldest_go_first() -> None:
    lanes = lay(16)
    h, saved = made(lanes, 0.0)
    keep = Keep(2 * measure(saved))
    for key in "abc":
        assert keep.make_room(measure(saved))
        keep.put(key, lanes, saved)
        assert keep.used <= 2 * measure(saved)
    assert keep.take("a", lanes, h) is None
    assert keep.take("b", lanes, h) is not None
    assert not keep.make_room(2 * measure(saved) + 1)
    assert keep.take("c", lanes, h) is not None, "what never fits drops nobody"


def test_another_input_is_not_what_was_kept() -> None:
    keep, lanes = Keep(10_000), lay(16)
    h, saved = made(lanes, 0.0)
    keep.put("a", lanes, saved)
    assert keep.take("a", lanes, h + 1) is None
    keep.put("a", lanes, saved)
    assert keep.take("a", lay(24), torch.zeros(24, 2)) is None
    assert keep.used == 0


def test_a_missing_lane_makes_all_of_them_again() -> None:
    keep, lanes = Keep(10_000), lay(16, 16)
    h, saved = made(lanes, 0.0)
    keep.put("ab", lanes, saved)
    assert keep.take("ax", lanes, h) is None
    assert keep.take("b", lay(16), h[16:]) is not None
