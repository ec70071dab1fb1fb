"""Rows that the server holds: named by their owner, bounded, and lost without harm."""

from dataclasses import replace

import numpy as np
import pytest

from fellray.platform.messages import Activation, Lease, Unheld
from fellray.platform.recall import Known, Recall, leave_out_all, rows_sent
from fellray.platform.wire import name_rows

H = np.arange(12, dtype=np.float32).reshape(6, 2)


def message(clients: tuple[str, ...] = ("a", "b"), h: np.ndarray = H) -> Activation:
    """Rows of 1, 2 and 3 tokens; the first and last are b's."""
    owners, lengths = np.array([1, 0, 1], np.int32), np.array([1, 2, 3], np.int32)
    return name_rows(Activation("r", 1, 0, Lease("s", 1), clients, owners, lengths, h))


def test_what_came_once_may_be_left_out() -> None:
    recall, known, whole = Recall(10**6), Known(), message()
    assert known.leave_out(whole) is whole, "nothing is known yet"
    recall.complete(whole)
    known.add(whole)
    assert recall.used == H.nbytes
    sent = known.leave_out(whole)
    assert len(sent.h_Ld) == 0
    assert sent.num_tokens == 6
    assert (recall.complete(sent).h_Ld == H).all()
    other = message(h=np.concatenate([H[:1], H[1:3] + 1, H[3:]]))
    part = known.leave_out(other)
    assert part.sent_N is not None
    assert part.sent_N.tolist() == [False, True, False]
    assert (part.h_Ld == H[1:3] + 1).all()
    assert rows_sent(part).lengths_N.tolist() == [2]
    assert (recall.complete(part).h_Ld == other.h_Ld).all()


def test_a_row_is_its_owners() -> None:
    recall, whole = Recall(10**6), message()
    recall.complete(whole)
    stranger = leave_out_all(message(clients=("a", "c")))
    with pytest.raises(Unheld, match="2 of 3 rows"):
        recall.complete(stranger)


def test_the_longest_unused_go_first() -> None:
    recall, whole = Recall(H.nbytes), message()
    recall.complete(whole)
    # b's first row is used again, then a row of one token comes
    first = replace(
        whole,
        row_client_N=whole.row_client_N[:1],
        lengths_N=whole.lengths_N[:1],
        names_NB=whole.names_NB[:1] if whole.names_NB is not None else None,
        sent_N=np.array([False]),
        h_Ld=H[:0],
    )
    assert (recall.complete(first).h_Ld == H[:1]).all()
    new = name_rows(replace(first, h_Ld=H[:1] - 1, names_NB=None, sent_N=None))
    recall.complete(new)
    assert recall.used <= H.nbytes
    assert (recall.complete(first).h_Ld == H[:1]).all()
    with pytest.raises(Unheld, match="1 of 3 rows"):
        recall.complete(leave_out_all(whole))
    assert (recall.complete(whole).h_Ld == H).all(), "with all rows it is as good as ever"


def test_nothing_fits_or_nothing_is_left() -> None:
    recall, whole = Recall(4), message()
    assert (recall.complete(whole).h_Ld == H).all()
    assert recall.used == 0
    roomy = Recall(10**6)
    roomy.complete(whole)
    roomy.drop(whole)
    roomy.drop(whole)
    assert roomy.used == 0


def test_rows_are_copies() -> None:
    recall, mine = Recall(10**6), H.copy()
    whole = message(h=mine)
    recall.complete(whole)
    mine[:] = -1.0
    assert (recall.complete(leave_out_all(whole)).h_Ld == H).all()


def test_without_names_nothing_happens() -> None:
    plain = replace(message(), names_NB=None, sent_N=None)
    recall, known = Recall(10**6), Known()
    known.add(plain)
    assert recall.complete(plain) is known.leave_out(plain) is leave_out_all(plain) is plain
    assert rows_sent(plain) is plain
    assert recall.used == 0
