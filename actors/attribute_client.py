"""Clients on attributes: users' samples and everything private about them, thousands in an actor.

A user is a client. Those who take part in a round train side by side, in one batched pass for all
who have about as many samples. The class is plain; `Pool` makes it an actor, tests use it as it is.
It does not know how updates are mixed, or what Ray is.

Shapes: C clients asked, S of them side by side, B rows of each, P numbers of one client.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fellray.platform.adaptation import Layout, Rows, pack, score, train, unpack
from fellray.platform.attribute_model import Backbone, look_up
from fellray.platform.click_data import ClickData
from fellray.platform.click_score import ClickScore, pool_clicks, score_users
from fellray.platform.clicks import SPLITS, TRAIN
from fellray.platform.config import RunConfig
from fellray.platform.fedpa import GROUP, Fedpa
from fellray.platform.ledger import Ledger
from fellray.platform.manifest import Staged
from fellray.platform.messages import LedgerRow, StaleLease, Update
from fellray.platform.privacy import find_key, privatise_round
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.rounds import EVERYONE, Rounds

PRIVATE, COMMON = "private.values", "common.values"
"""Tensors of a round: a client's own, everybody's."""

ROWS = 32768
"""At most so many rows side by side, where one client has no more."""
LEAST = 16
"""Rows that a client is padded to at least."""


def name_values(attribute: str) -> str:
    """The tensor that the groups of an attribute own."""
    return f"{GROUP}{attribute}.values"


class AttributeClient:
    """The clients of one actor."""

    def __init__(
        self,
        config: RunConfig,
        index: int,
        first: int,
        last: int,
        backbone: Backbone,
        groups: Mapping[str, Sequence[str]],
        rounds: Rounds,
    ):
        """Its clients are `first`..`last` - 1 in the data.

        Args:
            index: names this actor's files.
            groups: attribute -> the group of each of its clients.
        """
        torch.set_num_threads(config.clients.threads)
        assert isinstance(config.method, Fedpa)
        self._config, self._method = config, config.method
        self._holder = f"clients-{index:05d}"
        self._rounds, self._backbone = rounds, backbone
        self._layout = Layout(backbone.shape, config.method)
        data = ClickData(config.data.path)
        self.learners = data.clients[first:last]
        """Who has a seat here, sorted."""
        self._place = {client: i for i, client in enumerate(self.learners)}
        self._groups = groups
        self._base_SU = look_up(backbone.users, data.users()[first:last])
        self._items = data.items()
        found = data.samples(first, last)
        self._item_N, self._label_N = found["item"], found["label"].astype(np.float32)
        sizes = np.diff(found["ends"], prepend=0)
        user_N = np.repeat(np.arange(last - first), sizes)
        kinds = [np.bincount(user_N[found["split"] == k], minlength=last - first) for k in SPLITS]
        self._sizes = np.stack(kinds)
        # by time, so that each split of a client is one stretch
        self._begins = found["ends"] - sizes + self._sizes.cumsum(0) - self._sizes
        self._ledger = Ledger()
        self._key = find_key(config)
        self._pulled: tuple[int, set[str]] = (-1, set())
        self._trained: tuple[int, dict[str, int], Tensor] = (-1, {}, torch.empty(0, 0))
        """Round, row of each client, and what their private blocks have become."""
        self._installed: tuple[int, tuple[Staged, ...]] = (-1, ())

    def fit(self, round: int, clients: Sequence[str]) -> Update:
        """Local training of `clients`, who have their seats here, from the committed state."""
        began = time.perf_counter()
        layout, factor = self._layout, self._method.decay ** (round - 1)
        own = self._pull(round - 1, clients)
        private = torch.empty(len(clients), layout.private_size)
        sent = torch.empty(len(clients), sum(p.size for p in layout.sent))
        losses, samples = torch.zeros(2, len(clients), dtype=torch.float64)
        begin_C, size_C = self._find(clients, TRAIN)
        for at in _side_by_side(size_C, self._method.batch_size):
            here = {name: values[at] for name, values in own.items()}
            few = [clients[i] for i in at.tolist()]
            steps = self._steps(round, few, begin_C[at], size_C[at])
            after, summed = train(layout, self._backbone.layers, here, steps, factor)
            private[at] = pack(layout.private, after)
            sent[at] = pack(layout.sent, after)
            samples[at] = torch.from_numpy(size_C[at]).double() * self._method.epochs
            losses[at] = summed / samples[at]
        finite_C = private.isfinite().all(1) & sent.isfinite().all(1) & losses.isfinite()
        refused = {
            client: "its round brought a NaN or an infinity"
            for client, finite in zip(clients, finite_C.tolist(), strict=True)
            if not finite
        }
        self._trained = (round, {client: i for i, client in enumerate(clients)}, private)
        told, stage = losses.tolist(), self._config.privacy
        if not isinstance(stage, NoPrivacy):
            start = pack(layout.sent, own)
            sent, told = privatise_round(
                start, sent, told, stage, self._key, round, clients, refused
            )
        for client, values, loss in zip(clients, sent.numpy(), told, strict=True):
            if values.size:
                self._ledger.enter(client, "adapter_up", values)
            if isinstance(stage, NoPrivacy) or not math.isnan(loss):  # a NaN is not sent
                self._ledger.enter(client, "loss", np.array(loss))
        return Update(
            (),
            tuple(clients),
            sent.numpy(),
            tuple(told),
            tuple(int(n) for n in samples.tolist()),
            (time.perf_counter() - began,) * len(clients),
            refused,
        )

    def install(self, round: int, clients: Sequence[str]) -> tuple[Staged, ...]:
        """Stage what training made of the private blocks of `clients`; the others keep theirs.

        Raises:
            StaleLease: this actor lost what it trained (it was restarted since): replay the round.
        """
        if self._installed[0] == round:
            return self._installed[1]
        trained, row, private = self._trained
        if clients and (trained != round or not row.keys() >= set(clients)):
            raise StaleLease(f"{self._holder} was restarted after training")
        staged: tuple[Staged, ...] = ()
        if clients:
            values = private[[row[client] for client in clients]]
            staged = (self._rounds.stage(round, self._holder, clients, {PRIVATE: values}),)
        self._trained = (-1, {}, torch.empty(0, 0))
        self._installed = (round, staged)
        return staged

    def evaluate(
        self,
        round: int,
        split: int,
        clients: Sequence[str],
        staged: Sequence[Staged] | None = None,
    ) -> dict[str, ClickScore]:
        """The score of all `clients` together on their samples of a split, under this actor's name:
        what is told of clicks is told of no client alone, but where an actor has only one.

        Args:
            staged: the files of `round`, where it is not committed yet.
        """
        if staged is not None:
            self._rounds.expect(round, staged)
        if not clients:
            return {}
        own = self._pull(round, clients)
        begin_C, size_C = self._find(clients, split)
        ends_C = size_C.cumsum()
        logits, labels = np.zeros((2, int(size_C.sum())), np.float32)
        for at in _side_by_side(size_C, None):
            here = {name: values[at] for name, values in own.items()}
            few = [clients[i] for i in at.tolist()]
            rows = [b + np.arange(n) for b, n in zip(begin_C[at], size_C[at], strict=True)]
            batch = self._gather(few, rows)
            with torch.no_grad():
                found = score(self._layout, self._backbone.layers, here, batch)
            real_SB = batch.weights_SB.bool()
            places = np.concatenate(
                [e - n + np.arange(n) for e, n in zip(ends_C[at], size_C[at], strict=True)]
            )
            logits[places], labels[places] = (
                found[real_SB].numpy(),
                batch.labels_SB[real_SB].numpy(),
            )
        owner_N = np.repeat(np.arange(len(clients)), size_C)
        return {self._holder: pool_clicks(score_users(logits, labels, owner_N, len(clients)))}

    def measure_adapters(self, round: int, clients: Sequence[str]) -> dict[str, float]:
        """The largest Frobenius norm of any of their adapter factors: `user.A`, `group.B` ..."""
        kinds = ("user.A", "user.B", "group.A", "group.B")
        largest = dict.fromkeys(kinds, 0.0)
        if not clients:
            return largest
        own = self._pull(round, clients)
        for name, values in own.items():
            kind = f"{name.split('.')[0]}.{name[-1]}"
            if kind in largest:
                norm = float(values.flatten(1).norm(dim=1).max())
                largest[kind] = max(largest[kind], norm)
        return largest

    def close_ledger(self) -> list[LedgerRow]:
        """What was exchanged since the last call."""
        return self._ledger.close()

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._ledger.void()
        self._trained = (-1, {}, torch.empty(0, 0))
        self._installed = (-1, ())
        self._pulled = (-1, set())

    def _pull(self, round: int, clients: Sequence[str]) -> dict[str, Tensor]:
        """The state of clients at a round: their own, and what of the others' they receive."""
        layout = self._layout
        own = unpack(layout.private, self._rounds.load(round, clients, [PRIVATE])[PRIVATE])
        common = self._rounds.load(round, [EVERYONE], [COMMON])[COMMON]
        own |= unpack(layout.common, common.expand(len(clients), -1))
        received = [common[:, -p.size :] for p in layout.common[-1:] if p.rate]
        received += [common[:, : -layout.common[-1].size] for p in layout.common[:1] if p.rate]
        down = [values.expand(len(clients), -1) for values in received]
        for attribute, parts in layout.groups.items():
            of_clients = [self._groups[attribute][self._place[c]] for c in clients]
            names, at = np.unique(of_clients, return_inverse=True)
            tensor = name_values(attribute)
            values = self._rounds.load(round, names.tolist(), [tensor])[tensor][at]
            own |= unpack(parts, values)
            down += [values] if parts[0].rate else []
        if self._pulled[0] != round:
            self._pulled = (round, set())
        if down:
            for client, numbers in zip(clients, torch.cat(down, 1).numpy(), strict=True):
                if client not in self._pulled[1]:
                    self._ledger.enter(client, "adapter_down", numbers)
        self._pulled[1].update(clients)
        return own

    def _find(self, clients: Sequence[str], split: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each client's samples of a split begin, and how many there are [C]."""
        places = [self._place[client] for client in clients]
        return self._begins[split, places], self._sizes[split, places]

    def _steps(
        self, round: int, clients: Sequence[str], begin_S: np.ndarray, size_S: np.ndarray
    ) -> Iterator[Rows]:
        """A round's steps of clients who all have as many of them."""
        most = self._method.batch_size
        for epoch in range(self._method.epochs):
            if size_S.max() <= most:
                yield self._gather(
                    clients, [b + np.arange(n) for b, n in zip(begin_S, size_S, strict=True)]
                )
                continue
            # rows that make several steps come in an order of their own in each epoch
            orders = [
                begin + self._generator(client, round, epoch).permutation(size)
                for client, begin, size in zip(clients, begin_S, size_S, strict=True)
            ]
            for at in range(0, int(size_S.max()), most):
                yield self._gather(clients, [order[at : at + most] for order in orders])

    def _gather(self, clients: Sequence[str], rows: Sequence[np.ndarray]) -> Rows:
        """Some samples of each client, padded alike."""
        sizes = np.array([len(places) for places in rows])
        width = _padded(int(sizes.max()))
        real_SB = np.arange(width) < sizes[:, None]
        places_SB = np.zeros(real_SB.shape, np.int64)
        places_SB[real_SB] = np.concatenate(rows)
        codes = self._items[torch.from_numpy(self._item_N[places_SB].ravel()).long()]
        items = look_up(self._backbone.items, codes)
        return Rows(
            self._base_SU[[self._place[client] for client in clients]],
            items.view(len(clients), width, -1),
            torch.from_numpy(self._label_N[places_SB]),
            torch.from_numpy(real_SB.astype(np.float32)),
        )

    def _generator(self, client: str, round: int, epoch: int) -> np.random.Generator:
        key = np.random.SeedSequence(self._config.seed, spawn_key=(int(client[1:]), round, epoch))
        return np.random.Generator(np.random.Philox(key))


def _padded(rows: int) -> int:
    """A power of two."""
    return max(LEAST, 1 << (rows - 1).bit_length())


def _side_by_side(sizes_C: np.ndarray, batch: int | None) -> Iterator[np.ndarray]:
    """Places of clients who are padded to the same rows and take as many steps; few enough.

    Clients without rows are left out; who would be alone is there twice.
    """
    kinds: dict[tuple[int, int], list[int]] = {}
    for at, size in enumerate(sizes_C.tolist()):
        if size:
            steps = 1 if batch is None else -(-size // batch)
            kinds.setdefault((_padded(size if steps == 1 else batch or size), steps), []).append(at)
    for (width, _), members in sorted(kinds.items()):
        most = max(1, ROWS // width)
        for begin in range(0, len(members), most):
            few = np.array(members[begin : begin + most])
            yield few if len(few) > 1 else few.repeat(2)
