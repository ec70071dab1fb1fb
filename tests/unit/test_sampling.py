"""Who takes part in a round: exact counts, exact probabilities, and the same again in a replay."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fellray.platform.config import parse
from fellray.platform.errors import FellrayError
from fellray.platform.sampling import Sampler
from fellray.platform.traces import Trace
from fellray.platform.train_config import SamplingConfig


def ids(count: int) -> list[str]:
    return [f"c{i:06d}" for i in range(count)]


def sampler(count: int, seed: int = 0, sizes: Any = None, **settings: Any) -> Sampler:
    sizes = None if sizes is None else np.asarray(sizes)
    return Sampler(SamplingConfig(**settings), seed, ids(count), sizes)


def count_rounds(drawn: Sampler, count: int, rounds: int) -> np.ndarray:
    """How often each client was sampled."""
    total = np.zeros(count, np.int64)
    for t in range(rounds):
        total[drawn.sample(t)] += 1
    return total


def write_trace(folder: Path, rows: list[tuple[str, int, int]]) -> Path:
    file = folder / "trace.parquet"
    client, start, end = zip(*rows, strict=True)
    pq.write_table(pa.table({"client": client, "start": start, "end": end}), file)
    return file


def check_form(indices: np.ndarray, count: int) -> None:
    assert indices.dtype == np.int64
    assert (np.diff(indices) > 0).all(), "ascending, each once"
    assert 0 <= indices[0] <= indices[-1] < count


# every kind


@settings(deadline=None)
@given(
    kind=st.sampled_from(["uniform", "by_size", "round_robin"]),
    sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=40),
    per_round=st.integers(1, 50),
    over_select=st.floats(1, 3),
    seed=st.integers(0, 2**40),
    round=st.integers(0, 10**9),
)
def test_as_many_as_asked_and_the_same_in_a_replay(
    kind: str, sizes: list[int], per_round: int, over_select: float, seed: int, round: int
) -> None:
    settings = {"kind": kind, "per_round": per_round, "over_select": over_select}
    one = sampler(len(sizes), seed, sizes, **settings)
    indices = one.sample(round)
    check_form(indices, len(sizes))
    asked = one_asked(per_round, over_select)
    assert len(indices) == min(asked, len(sizes))
    one.sample(round + 1)
    assert np.array_equal(one.sample(round), indices), "other rounds leave no trace"
    assert np.array_equal(sampler(len(sizes), seed, sizes, **settings).sample(round), indices)


def one_asked(per_round: int, over_select: float) -> int:
    asked = SamplingConfig(per_round=per_round, over_select=over_select).asked
    assert asked is not None
    assert asked - 1 < per_round * over_select + 1e-6
    assert per_round * over_select - 1e-6 < asked + 1e-6
    return asked


@pytest.mark.parametrize(
    ("per_round", "over_select", "asked"),
    [(10, 1.0, 10), (10, 1.1, 11), (10, 1.01, 11), (3, 1.5, 5), (100, 1.3, 130), (1, 1.0001, 2)],
)
def test_how_many_are_asked(per_round: int, over_select: float, asked: int) -> None:
    assert SamplingConfig(per_round=per_round, over_select=over_select).asked == asked


def test_everybody_by_default() -> None:
    assert SamplingConfig().asked is None
    assert sampler(7).sample(3).tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["uniform", "by_size", "round_robin"])
def test_seeds_and_rounds_differ(kind: str) -> None:
    sizes = np.arange(1, 1001)
    here = sampler(1000, 0, sizes, kind=kind, per_round=20)
    there = sampler(1000, 1, sizes, kind=kind, per_round=20)
    assert not np.array_equal(here.sample(1), here.sample(2))
    assert not np.array_equal(here.sample(1), there.sample(1))


def test_a_stream_of_its_own_for_each_round() -> None:
    """Counter-based: seed 1 at round 2 is not seed 2 at round 1, nor any other pair."""
    drawn = [sampler(2000, seed, kind="uniform", per_round=8) for seed in range(20)]
    seen = {tuple(one.sample(t)) for one in drawn for t in range(20)}
    assert len(seen) == 400


# uniform


def test_uniform_is_uniform() -> None:
    """Chi-square at 49 degrees of freedom: within its 0.1 % and 99.9 % quantiles."""
    rounds, count, wanted = 2000, 50, 5
    seen = count_rounds(sampler(count, kind="uniform", per_round=wanted), count, rounds)
    expected = rounds * wanted / count
    # without replacement the counts vary less, by (C - k) / (C - 1)
    chi2 = ((seen - expected) ** 2).sum() / expected * (count - 1) / (count - wanted)
    assert 23.98 < chi2 < 85.35


def test_uniform_pairs_are_uniform() -> None:
    """All 10 pairs of 5 clients alike: chi-square at 9 degrees of freedom."""
    drawn = sampler(5, seed=3, kind="uniform", per_round=2)
    seen = Counter(tuple(drawn.sample(t)) for t in range(2000))
    assert len(seen) == 10
    assert 1.15 < sum((n - 200) ** 2 / 200 for n in seen.values()) < 27.88


def test_uniform_over_a_large_roster() -> None:
    """Numpy takes another way here; the halves and the evens must be hit alike."""
    drawn = sampler(100_000, kind="uniform", per_round=100)
    found = np.concatenate([drawn.sample(t) for t in range(300)])
    assert abs((found < 50_000).mean() - 0.5) < 4 * (0.25 / 30_000) ** 0.5
    assert abs((found % 2).mean() - 0.5) < 4 * (0.25 / 30_000) ** 0.5


# by size


@pytest.mark.parametrize(
    ("sizes", "per_round", "inclusion"),
    [
        ([1, 2, 3, 4], 1, [0.1, 0.2, 0.3, 0.4]),
        ([1, 2, 3, 4], 2, [0.2, 0.4, 0.6, 0.8]),
        ([1, 1, 1, 97], 2, [1 / 3, 1 / 3, 1 / 3, 1]),
        ([50, 1, 1, 48], 3, [1, 0.5, 0.5, 1]),
        ([5, 5, 5, 5, 5], 3, [0.6] * 5),
        ([0, 3, 0, 1], 1, [0, 0.75, 0, 0.25]),
        ([0, 3, 0, 1], 3, [0, 1, 0, 1]),
        (list(range(1, 31)), 10, [min(1, i / 46.5) for i in range(1, 31)]),
        ([1, 7] * 100, 60, [60 / 800, 60 * 7 / 800] * 100),
    ],
)
def test_by_size_includes_in_proportion(
    sizes: list[int], per_round: int, inclusion: list[float]
) -> None:
    rounds = 1500
    drawn = sampler(len(sizes), 5, sizes, kind="by_size", per_round=per_round)
    rate = count_rounds(drawn, len(sizes), rounds) / rounds
    wanted = np.array(inclusion)
    deviation = (wanted * (1 - wanted) / rounds) ** 0.5
    assert (np.abs(rate - wanted) <= 4.2 * deviation).all(), (rate, wanted)


def test_by_size_beats_what_successive_draws_would_give() -> None:
    """Redrawing what was already drawn includes the largest with .712 here, not with .8."""
    rounds = 3000
    seen = count_rounds(sampler(3, 1, [1, 1, 3], kind="by_size", per_round=1), 3, rounds)
    assert abs(seen[2] / rounds - 0.6) < 0.035
    seen = count_rounds(sampler(4, 1, [1, 2, 3, 4], kind="by_size", per_round=2), 4, rounds)
    assert abs(seen[3] / rounds - 0.8) < 0.035


def test_by_size_lets_almost_all_pairs_meet() -> None:
    """Clients far apart on the line meet as often as by chance, and companions change."""
    count, wanted, rounds = 40, 10, 2000
    drawn = sampler(count, 2, [3] * count, kind="by_size", per_round=wanted)
    pairs = np.zeros((count, count))
    different = set()
    for t in range(rounds):
        chosen = drawn.sample(t)
        different.add(tuple(chosen))
        pairs[np.ix_(chosen, chosen)] += 1
    assert len(different) > 0.99 * rounds
    off = pairs[~np.eye(count, dtype=bool)] / rounds
    assert (off > 0).mean() > 0.94
    assert abs(np.median(off) - 0.25 * 0.25) < 0.01


@settings(deadline=None)
@given(
    sizes=st.lists(
        st.floats(0, 1e12, allow_nan=False, allow_subnormal=False), min_size=1, max_size=30
    ).filter(any),
    per_round=st.integers(1, 30),
    round=st.integers(0, 10**6),
)
def test_by_size_never_draws_a_client_twice(sizes: list[float], per_round: int, round: int) -> None:
    indices = sampler(len(sizes), 0, sizes, kind="by_size", per_round=per_round).sample(round)
    check_form(indices, len(sizes))
    assert len(indices) == min(per_round, sum(size > 0 for size in sizes))
    assert all(sizes[i] > 0 for i in indices)


def test_by_size_needs_data() -> None:
    with pytest.raises(FellrayError, match=r"by_size: no registered client has training data"):
        sampler(2, 0, [0, 0], kind="by_size", per_round=1)


# round robin


@pytest.mark.parametrize(("count", "per_round"), [(12, 3), (12, 12), (10, 3), (7, 5), (1, 1)])
def test_round_robin_covers_everybody_once_a_cycle(count: int, per_round: int) -> None:
    drawn = sampler(count, 9, kind="round_robin", per_round=per_round)
    for first in (0, count, 10**6 * count):
        seen = np.zeros(count, int)
        for t in range(first, first + count):  # per_round cycles
            seen[drawn.sample(t)] += 1
        assert (seen == per_round).all()
    if count % per_round == 0:
        cycle = np.concatenate([drawn.sample(t) for t in range(1, 1 + count // per_round)])
        assert sorted(cycle) == list(range(count))


def test_round_robin_waits_a_cycle_between_two_turns() -> None:
    drawn = sampler(10, 9, kind="round_robin", per_round=3)
    turns = [t for t in range(40) if 4 in drawn.sample(t)]
    assert set(np.diff(turns)) == {3, 4}


# traces


def test_a_trace_is_respected(tmp_path: Path) -> None:
    file = write_trace(
        tmp_path,
        [("c000000", 0, 3), ("c000002", 2, 4), ("c000000", 6, 7), ("c000003", 2, 1000)],
    )
    drawn = sampler(5, kind="trace", trace=file)
    there = {t: drawn.sample(t).tolist() for t in (0, 1, 2, 3, 4, 6, 7, 999)}
    assert there == {
        0: [0],
        1: [0],
        2: [0, 2, 3],
        3: [2, 3],
        4: [3],
        6: [0, 3],
        7: [3],
        999: [3],
    }
    with pytest.raises(FellrayError, match=r"trace.parquet: no .* available in round 1000; add"):
        drawn.sample(1000)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 20), st.integers(1, 12)), min_size=1),
    round=st.integers(0, 40),
    per_round=st.integers(1, 9),
)
def test_a_trace_equals_looking_at_every_row(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[int, int, int]],
    round: int,
    per_round: int,
) -> None:
    intervals = [(ids(9)[c], start, start + length) for c, start, length in rows]
    file = write_trace(tmp_path_factory.mktemp("trace"), intervals)
    there = sorted({c for c, start, length in rows if start <= round < start + length})
    drawn = sampler(9, kind="trace", trace=file, per_round=per_round)
    if not there:
        with pytest.raises(FellrayError, match=f"in round {round}"):
            drawn.sample(round)
        return
    indices = drawn.sample(round)
    check_form(indices, 9)
    assert set(indices) <= set(there)
    assert len(indices) == min(per_round, len(there))


def test_intervals_inside_one_another_count_once(tmp_path: Path) -> None:
    rows = [("c000001", 0, 10), ("c000001", 1, 2), ("c000001", 5, 6), ("c000000", 3, 4)]
    trace = Trace(write_trace(tmp_path, [*rows, ("c000001", 10, 12)]), ids(2))
    assert [trace.available(t).tolist() for t in (1, 5, 9, 11)] == [[0]] * 4
    assert trace.available(12).tolist() == []


def test_a_trace_draws_alike_among_the_available(tmp_path: Path) -> None:
    file = write_trace(tmp_path, [(name, 0, 10**6) for name in ids(20)[::2]])
    seen = count_rounds(sampler(20, kind="trace", trace=file, per_round=3), 20, 1500)
    assert (seen[1::2] == 0).all()
    chi2 = ((seen[::2] - 450) ** 2).sum() / 450 * 9 / 7
    assert 1.15 < chi2 < 27.88


def test_another_roster_reads_no_trace_again(tmp_path: Path) -> None:
    file = write_trace(tmp_path, [(name, 0, 5) for name in ids(4)])
    trace = Trace(file, ids(6))
    file.unlink()
    config = SamplingConfig(kind="trace", trace=file)
    roster = ["c000001", "c000003", "c000005"]
    assert Sampler(config, 0, roster, trace=trace).sample(2).tolist() == [0, 1]
    with pytest.raises(FellrayError, match="no registered client is available in round 2"):
        Sampler(config, 0, ["c000005"], trace=trace).sample(2)


def test_a_file_may_be_dictionary_encoded_and_narrow(tmp_path: Path) -> None:
    file = tmp_path / "trace.parquet"
    columns = {
        "end": pa.array([4], pa.uint8()),
        "client": pa.array(["c000001"]).dictionary_encode(),
        "start": pa.array([2], pa.int16()),
        "note": ["ignored"],
    }
    pq.write_table(pa.table(columns), file)
    assert sampler(2, kind="trace", trace=file).sample(3).tolist() == [1]


GOOD: dict[str, Any] = {"client": ["c000000", "c000001"], "start": [0, 1], "end": [2, 3]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"client": ["c000000", "who"]}, ["client 'who' (1 in all)", "remove these rows"]),
        ({"start": None}, ["needs one column 'start'", "it has client, end", "client, start, end"]),
        ({"client": []}, ["has no rows", "sampling.kind=trace"]),
        ({"end": [2, 1]}, ["start must be below end", "'c000001' has start 1, end 1", "first"]),
        ({"end": [2, -1]}, ["start must be below end", "start 1, end -1 (1 such rows)"]),
        ({"start": [0.0, 1.0]}, ["start is of type double", "round numbers"]),
        ({"end": ["2", "3"]}, ["end is of type string", "whole numbers"]),
        ({"client": [0, 1]}, ["client is of type int64", "must be text"]),
        ({"client": ["c000000", None]}, ["client is null in 1 of 2 rows", "remove"]),
        ({"end": [2, None]}, ["end is null in 1 of 2 rows", "remove"]),
        ({"end": pa.array([2, 2**63], pa.uint64())}, ["end does not fit int64", "lower"]),
    ],
)
def test_a_trace_that_cannot_be_used(
    change: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    columns = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    if columns["client"] == []:
        types = [pa.string(), pa.int64(), pa.int64()]
        columns = {n: pa.array([], t) for n, t in zip(columns, types, strict=True)}
    file = tmp_path / "trace.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(FellrayError) as error:
        sampler(2, kind="trace", trace=file)
    assert [word for word in [str(file), *words] if word not in str(error.value)] == []


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.parquet"
    with pytest.raises(FellrayError, match=r"trace.parquet: does not exist; check sampling.trace"):
        sampler(2, kind="trace", trace=file)
    file.write_text("client,start,end\n")
    with pytest.raises(FellrayError, match=r"trace.parquet: cannot be read .* whole Parquet file"):
        sampler(2, kind="trace", trace=file)


# the config


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"kind": "trace"}, "kind trace needs sampling.trace=<Parquet file>"),
        ({"trace": "x.parquet"}, "trace is read by kind trace only, kind is uniform"),
        ({"over_select": 1.5}, "over_select 1.5 needs sampling.per_round="),
        ({"kind": "by_size"}, "kind by_size needs sampling.per_round="),
        ({"kind": "round_robin"}, "kind round_robin needs sampling.per_round="),
        ({"per_round": 0}, "sampling.per_round: "),
        ({"per_round": 3, "over_select": 0.9}, "sampling.over_select: "),
        ({"per_round": 3, "over_select": ".inf"}, "sampling.over_select: "),
        ({"deadline_s": 0}, "sampling.deadline_s: "),
        ({"kind": "random"}, "sampling.kind: "),
        ({"per_rounds": 3}, "did you mean 'per_round'?"),
    ],
)
def test_settings_that_do_not_fit(section: dict[str, Any], words: str) -> None:
    with pytest.raises(FellrayError) as error:
        parse({"sampling": section}, "mine.yaml")
    assert words in str(error.value)
    assert "mine.yaml" in str(error.value)
