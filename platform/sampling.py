"""Sampling: which registered clients take part in a round.

Draws are counter-based (seed, round): a replayed round asks the same clients, and nothing is
stored. It must not know what a client is, who answered, or when.

Letters: C registered clients, k asked, i, j clients.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fellray.platform.errors import FellrayError
from fellray.platform.traces import Trace
from fellray.platform.train_config import SamplingConfig

_DRAW, _ORDER = 1, 2
"""Streams of their own: of a round, and of the roster."""
_UNIT = 1 << 40
"""Inclusion probability 1. Whole numbers make the systematic draw exact: never a client twice."""


class Sampler:
    """Draws from one roster. Clients that join or leave mean another sampler, which is cheap.

    `uniform`: every set of k clients alike. `round_robin`: one seeded order; every C consecutive
    places hold everybody exactly once, and round t has the k places from t * k on. `trace`: uniform
    among the available. `by_size`: see `_BySize`.
    """

    def __init__(
        self,
        config: SamplingConfig,
        seed: int,
        registered: Sequence[str],
        sizes_C: np.ndarray | None = None,
        trace: Trace | None = None,
    ):
        """O(C), and for a trace that is not given the cost of reading it.

        Args:
            registered: sorted ids.
            sizes_C: rows of each client's training data; `by_size` needs them.
            trace: already read, where the roster changes; it may name clients that are not
                registered now. Otherwise `config.trace` is read, and must name nobody else.

        Raises:
            FellrayError: the trace cannot be used, or no client has data.
        """
        assert registered, "nobody is registered"
        self._seed = seed
        self._count = len(registered)
        self._asked = self._count if config.asked is None else min(config.asked, self._count)
        self._kind = config.kind
        if config.kind == "by_size":
            assert sizes_C is not None, "by_size needs sizes"
            assert len(sizes_C) == self._count, (len(sizes_C), self._count)
            order_C = _generator(seed, _ORDER, 0).permutation(self._count)
            self._by_size = _BySize(sizes_C, self._asked, order_C)
        elif config.kind == "round_robin":
            self._order_C = _generator(seed, _ORDER, 0).permutation(self._count)
        elif config.kind == "trace":
            assert config.trace is not None
            self._trace = Trace(config.trace, registered) if trace is None else trace
            place = pc.index_in(self._trace.clients, value_set=pa.array(registered, pa.string()))
            self._place = place.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)

    def sample(self, round: int) -> np.ndarray:
        """int64 indices into `registered`, ascending, each once: who is asked in a round.

        O(asked); with a trace O(log of its length + available). Fewer than asked come back where a
        trace has fewer, or fewer clients have data.

        Raises:
            FellrayError: the trace has nobody in this round.
        """
        assert round >= 0, round
        if self._kind == "trace":
            return self._sample_available(round)
        if self._kind == "by_size":
            return self._by_size.sample(_generator(self._seed, _DRAW, round))
        if self._asked == self._count:
            return np.arange(self._count, dtype=np.int64)
        if self._kind == "round_robin":
            places = (round * self._asked % self._count + np.arange(self._asked)) % self._count
            return np.sort(self._order_C[places])
        return _choose(_generator(self._seed, _DRAW, round), self._count, self._asked)

    def _sample_available(self, round: int) -> np.ndarray:
        places = self._place[self._trace.available(round)]
        available: np.ndarray = np.sort(places[places >= 0])
        if not len(available):
            raise FellrayError(
                f"{self._trace.path}: no registered client is available in round {round}; add an "
                f"interval with start <= {round} < end, or lower train.rounds"
            )
        if len(available) <= self._asked:
            return available
        chosen = _choose(_generator(self._seed, _DRAW, round), len(available), self._asked)
        sampled: np.ndarray = available[chosen]
        return sampled


class _BySize:
    """k clients without replacement, i with probability exactly pi_i = min(1, c * size_i).

    c is such that the pi_i sum to k: clients with more than a k-th of all data are always in, those
    without data never. The others are drawn by Deville's systematic sampling ("Une nouvelle (encore
    une !) méthode de tirage à probabilités inégales", INSEE 1998): laid end to end by their pi they
    make a line; each stretch of length 1 gives one client, and one that lies across a border is
    drawn from the right stretch with what is left of its probability. The line is in seeded order
    and is cut open at another client every round. Clients less than a stretch apart meet more
    rarely than by chance. pi is rounded to multiples of 2^-40, and from 1 - 1e-9 on to 1.
    """

    def __init__(self, sizes_C: np.ndarray, asked: int, order_C: np.ndarray):
        """Args: order_C: a permutation of the clients."""
        size_C = np.asarray(sizes_C, np.float64)
        assert np.isfinite(size_C).all(), "sizes must be finite"
        assert (size_C >= 0).all(), "sizes must not be negative"
        if not size_C.any():
            raise FellrayError(
                "sampling.kind=by_size: no registered client has training data; use uniform"
            )
        order = order_C[size_C[order_C] > 0]
        by_size = order[np.argsort(-size_C[order], kind="stable")]
        ordered = size_C[by_size]
        rest = np.cumsum(ordered[::-1])[::-1]
        slots = asked - np.arange(len(by_size))
        # the largest are certain as long as their share of what is left is a whole slot or more
        whole = (slots > 0) & (slots * ordered >= rest * (1 - 1e-9))
        certain = int(np.argmin(np.append(whole, False)))
        self._certain = by_size[:certain]
        self._slots = min(asked, len(by_size)) - certain
        drawn = np.ones(len(size_C), bool)
        drawn[self._certain] = False
        self._order = order[drawn[order]]
        if self._slots:
            share = np.cumsum(size_C[self._order])
            line = self._slots * _UNIT
            self._ends = np.rint(share / share[-1] * line).astype(np.int64)
            self._starts = np.r_[0, self._ends[:-1]]

    def sample(self, draw: np.random.Generator) -> np.ndarray:
        """int64, ascending. O(k log C)."""
        if not self._slots:
            return np.sort(self._certain)
        line = self._slots * _UNIT
        opened = self._starts[draw.integers(len(self._order))]
        border_k = (opened + _UNIT * np.arange(self._slots)) % line
        across_k = np.searchsorted(self._ends, border_k, side="right")
        before_k = border_k - self._starts[across_k]
        behind_k = np.minimum(self._ends[across_k] - border_k, _UNIT)
        # with before_k passed over, behind_k has the rest of the probability
        wins_k = draw.integers(0, _UNIT - before_k) < behind_k
        inner_k = border_k + behind_k + draw.integers(0, np.maximum(_UNIT - behind_k, 1))
        inner_k = np.searchsorted(self._ends, inner_k % line, side="right")
        chosen, last = [], -1
        for across, wins, inner in zip(
            across_k.tolist(), wins_k.tolist(), inner_k.tolist(), strict=True
        ):
            last = across if wins and last != across else inner
            chosen.append(last)
        return np.sort(np.concatenate([self._certain, self._order[chosen]]))


def _choose(draw: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """`wanted` of range(count), every set alike; O(wanted), and O(count) where that is small."""
    return np.sort(draw.choice(count, wanted, replace=False, shuffle=False)).astype(np.int64)


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    key = np.random.SeedSequence(seed, spawn_key=(stream, counter))
    return np.random.Generator(np.random.Philox(key))
