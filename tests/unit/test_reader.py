"""Histories and tokens of a step: against slow loops, and the same for any grouping."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellray.platform.config import RunConfig, parse
from fellray.platform.encoder import Tokens
from fellray.platform.errors import FellrayError
from fellray.platform.own import Own
from fellray.platform.reader import EVALUATION_ROWS, Batch, Reader, assemble
from fellray.platform.shard import Shard

PREFIX, SUFFIX = 101, 102


def catalogue(num_items: int, seed: int = 0) -> Tokens:
    """Item i's tokens are 1000 * i + 1, 2, ...; one to nine of them."""
    sizes = np.random.default_rng(seed).integers(1, 10, num_items)
    ids = np.concatenate([1000 * i + np.arange(1, n + 1) for i, n in enumerate(sizes)])
    return Tokens(ids.astype(np.int64), np.cumsum([0, *sizes]), PREFIX, SUFFIX, 0)


def shard(name: str, num_users: int, seed: int, num_items: int = 30) -> Shard:
    """Users of 1 to 9 interactions: the last two held out where there are enough."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 10, num_users)
    splits = np.concatenate(
        [np.r_[np.zeros(n - 2, np.uint8), 1, 2] if n > 3 else np.zeros(n) for n in sizes]
    )
    return Shard(
        name,
        np.arange(num_users) * 3,
        np.cumsum([0, *sizes]),
        draw.integers(0, num_items, int(sizes.sum())).astype(np.int32),
        splits.astype(np.uint8),
    )


SHARDS = {
    name: shard(name, users, seed)
    for seed, (name, users) in enumerate([("a", 9), ("b", 3), ("c", 20), ("d", 6)])
}
TOKENS = catalogue(30)


def config(local_samples: int = 10, batch_size: int = 4, seed: int = 0) -> RunConfig:
    return parse(
        {
            "seed": seed,
            "model": {"max_history": 4, "max_tokens": 32},
            "train": {"local_samples": local_samples, "batch_size": batch_size},
        },
        "test",
    )


def reader(*names: str, **settings: int) -> Reader:
    return Reader(config(**settings), TOKENS, {name: [SHARDS[name]] for name in names})


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    lengths = batch.rows.lengths_N.tolist()
    return [tuple(piece.tolist()) for piece in batch.ids_L.split(lengths)]


def read(one: Reader, slot: int, round: int) -> list[tuple[tuple[int, ...], int]]:
    """What a slot reads in a round, step by step: (ids, target)."""
    seen = []
    for batch, target_N in one.steps(round):
        for row, owner, target in zip(
            rows_of(batch), batch.slot_N.tolist(), target_N.tolist(), strict=True
        ):
            if owner == slot:
                seen.append((row, target))
    return seen


def slow_tokens(items: list[int], max_tokens: int) -> list[int]:
    """The newest items that fit, in order, between the special tokens."""
    kept: list[int] = []
    for item in reversed(items):
        own = TOKENS.ids[TOKENS.offsets[item] : TOKENS.offsets[item + 1]].tolist()
        if len(own) + len(kept) > max_tokens - 2:
            break
        kept = own + kept
    return [PREFIX, *kept, SUFFIX]


@given(
    st.lists(st.lists(st.integers(0, 29), max_size=6), min_size=1, max_size=8),
    st.sampled_from([16, 24, 64]),
)
def test_assemble_equals_the_slow_loop(histories: list[list[int]], max_tokens: int) -> None:
    items = np.full((len(histories), 6), -1)
    for row, history in enumerate(histories):
        items[row, 6 - len(history) :] = history
    ids, lengths = assemble(TOKENS, items, max_tokens)
    got = [piece.tolist() for piece in ids.split(lengths.tolist())]
    assert got == [slow_tokens(history, max_tokens) for history in histories]
    assert ids.dtype == lengths.dtype == torch.int64


def slow_examples(one: Shard) -> set[tuple[tuple[int, ...], int]]:
    """Every training history of a shard and what came next, user by user."""
    found = set()
    for start, stop in zip(one.offsets[:-1], one.offsets[1:], strict=True):
        train = [
            int(i)
            for i, s in zip(one.items[start:stop], one.splits[start:stop], strict=True)
            if s == 0
        ]
        for at in range(1, len(train)):
            found.add((tuple(slow_tokens(train[max(0, at - 4) : at], 32)), train[at]))
    return found


@pytest.mark.parametrize("name", list(SHARDS))
def test_a_pass_reads_every_history_once(name: str) -> None:
    targets = len(SHARDS[name].train_targets())
    one = reader(name, local_samples=targets)
    seen = read(one, 0, round=1)
    assert len(seen) == targets
    assert set(seen) == slow_examples(SHARDS[name])
    order = one._order(0, 1)
    assert len(set(order.tolist())) == targets, "without replacement"


def test_few_histories_are_read_again_after_all_were_read() -> None:
    targets = len(SHARDS["b"].train_targets())
    order = reader("b", local_samples=2 * targets + 1)._order(0, 1).tolist()
    assert len(order) == 2 * targets + 1
    assert sorted(order[:targets]) == sorted(order[targets : 2 * targets])
    assert len(set(order[:targets])) == targets


def test_many_histories_are_sampled_without_replacement() -> None:
    order = reader("c", local_samples=10)._order(0, 1).tolist()
    assert len(set(order)) == len(order) == 10


@pytest.mark.parametrize("group", [("a", "b", "c", "d"), ("b", "c"), ("c", "d")])
def test_the_same_rows_for_any_grouping(group: tuple[str, ...]) -> None:
    together = reader(*group)
    for round in (1, 2):
        for slot, name in enumerate(group):
            assert read(together, slot, round) == read(reader(name), 0, round)


def test_a_step_holds_a_batch_of_each_learner_side_by_side() -> None:
    one = reader("a", "c", local_samples=10, batch_size=4)
    batches = [batch for batch, _ in one.steps(1)]
    assert [batch.slot_N.tolist() for batch in batches] == [
        [0] * 4 + [1] * 4,
        [0] * 4 + [1] * 4,
        [0] * 2 + [1] * 2,
    ]
    assert torch.equal(batches[0].shard_N, batches[0].slot_N)
    assert one.samples(0) == 10


def test_who_has_own_histories_reads_those_and_nobody_else_other_ones() -> None:
    own = Own({}, {"a": 3, "c": 13})
    seats = {name: [SHARDS[name]] for name in ("a", "b", "c")}
    one, alike = Reader(config(), TOKENS, seats, own=own), Reader(config(), TOKENS, seats)
    assert [one.samples(slot) for slot in range(3)] == [3, 10, 13]
    counts = [torch.bincount(b.slot_N, minlength=3).tolist() for b, _ in one.steps(1)]
    assert counts == [[3, 4, 4], [0, 4, 4], [0, 2, 4], [0, 0, 1]]
    assert [one.ends(step) for step in range(4)] == [[0], [], [1], [2]]
    assert read(one, 0, 1) == read(alike, 0, 1)[:3]
    assert read(one, 1, 1) == read(alike, 1, 1)
    assert read(one, 2, 1) == read(reader("c", local_samples=13), 0, 1)
    seat = Reader(config(), TOKENS, {"all": [SHARDS["a"], SHARDS["b"]]}, own=own)
    assert seat.samples(0) == 13


def test_rounds_seeds_and_learners_draw_apart_and_repeat() -> None:
    one = reader("a", "c")
    assert read(one, 1, 1) == read(one, 1, 1)
    assert read(one, 1, 1) != read(one, 1, 2)
    assert read(one, 1, 1) != read(reader("a", "c", seed=1), 1, 1)
    same = Reader(config(), TOKENS, {"x": [SHARDS["c"]], "y": [SHARDS["c"]]})
    assert read(same, 0, 1) != read(same, 1, 1)


def test_the_global_generators_are_left_alone() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(reader("a").steps(1))
    assert torch.equal(torch_before, torch.get_rng_state())
    assert (np.random.get_state()[1] == numpy_before).all()


def test_one_seat_over_many_shards_reads_them_all() -> None:
    names = ("a", "b", "c")
    seat = Reader(config(local_samples=200), TOKENS, {"all": [SHARDS[n] for n in names]})
    assert seat.samples(0) == 600
    wanted = set().union(*(slow_examples(SHARDS[n]) for n in names))
    assert set(read(seat, 0, 1)) == wanted
    for batch, _ in seat.steps(1):
        assert batch.slot_N.abs().max() == 0
        assert set(batch.shard_N.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("split", [1, 2])
def test_held_out_users_come_shard_by_shard_with_their_truth(split: int) -> None:
    one = reader("a", "c")
    found = list(one.held_out(split, None))
    for index, name in enumerate(("a", "c")):
        held = SHARDS[name].held_out(split)
        mine = [f for f in found if int(f[0].shard_N[0]) == index]
        assert all(set(f[0].shard_N.tolist()) == {index} for f in mine), "one client, one batch"
        assert all(torch.equal(f[0].slot_N, f[0].shard_N) for f in mine)
        got = [row for f in mine for row in rows_of(f[0])]
        assert got == [tuple(slow_tokens(h[-4:].tolist(), 32)) for h in held.histories]
        for place, wanted in ((1, held.seen), (2, held.truth)):
            flat = [array for f in mine for array in f[place]]
            assert [a.tolist() for a in flat] == [w.tolist() for w in wanted]


def test_at_most_so_many_users_and_the_same_ones_every_time() -> None:
    one = reader("a", "c")
    first = [rows_of(f[0]) for f in one.held_out(1, 3)]
    assert [len(rows) for rows in first] == [3, 3]
    assert first == [rows_of(f[0]) for f in reader("a", "c", seed=5).held_out(1, 3)]
    everyone = [rows_of(f[0]) for f in one.held_out(1, None)]
    assert all(set(few) <= set(all_) for few, all_ in zip(first, everyone, strict=True))
    assert [rows_of(f[0]) for f in one.held_out(1, 999)] == everyone


def test_long_evaluations_are_cut_into_batches() -> None:
    big = shard("big", 3 * EVALUATION_ROWS, 7)
    sizes = [
        len(b.slot_N) for b, _, _ in Reader(config(), TOKENS, {"big": [big]}).held_out(1, None)
    ]
    assert max(sizes) == EVALUATION_ROWS
    assert sum(sizes) == len(big.held_out(1).users)


def test_a_learner_without_anything_to_learn_is_refused() -> None:
    idle = Shard(
        "idle", np.array([1]), np.array([0, 1]), np.array([3], np.int32), np.zeros(1, np.uint8)
    )
    with pytest.raises(FellrayError, match=r"client idle: has no history .* fewer clients"):
        Reader(config(), TOKENS, {"a": [SHARDS["a"]], "idle": [idle]})
