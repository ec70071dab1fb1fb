"""The recommender: a run's private side, answering queries from one committed round each.

It holds bottom, top, item vectors, histories, counts and a bounded number of adapters; the trunk is
somewhere else and is asked. Whoever waits crosses together. A query is pinned to the round that is
served when it arrives. This file must not know Ray or HTTP.
"""

import asyncio
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F

from fellray.platform.allocator import keep_freed_memory
from fellray.platform.batcher import Batcher
from fellray.platform.encoder import load_backbone, load_tokenizer
from fellray.platform.errors import FellrayError
from fellray.platform.messages import Activation, StaleLease
from fellray.platform.middle import Middle
from fellray.platform.origin import event_folder
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.platform.split import plan_cut
from fellray.serve.args import Args
from fellray.serve.blends import EVERYBODY, Blends, name_blend
from fellray.serve.catalogue import Catalogue
from fellray.serve.ends import Crossing, Ends, Question
from fellray.serve.events import Events
from fellray.serve.histories import NOTHING, Histories
from fellray.serve.items import Items, Reading
from fellray.serve.ladder import Counts, Known, Layer, choose_layer, find_nearest, stack_counts
from fellray.serve.ranking import Choice, Ranking, rank
from fellray.serve.refusal import Refusal
from fellray.serve.schema import (
    Answer,
    ByHistory,
    ByUser,
    ClientState,
    Item,
    Place,
    RunState,
)
from fellray.serve.selection import choose
from fellray.serve.served import Served, Watch
from fellray.serve.trunk import plain_config

TRIES = 3
"""Times a query is begun before it is refused: a round may be deleted while it is served."""
CHECK_S = 5.0
"""Seconds that the trunk has to say that it is there."""
_log = logging.getLogger("fellray.serve")


class Far(Protocol):
    """The far side of the cut: `serve.trunk.Trunk`, here or behind a handle."""

    async def forward(self, activation: Activation) -> np.ndarray:
        """Hidden states at the upper cut [L, d]."""
        ...

    async def ready(self) -> bool:
        """True, once it can be asked."""
        ...


@dataclass(frozen=True)
class _Asked:
    """A query that was looked up."""

    layer: Layer
    learner: str
    reading: Reading | None
    prior_T: torch.Tensor
    items: Items
    width: int
    choice: Choice


class Recommender:
    """Answers for all clients of a run."""

    def __init__(self, args: Args, trunk: Far):
        """Raises:
        FellrayError: there is no run, the round is not committed, or the prepared data or the
            encoder are missing or not those that the run was trained with.
        """
        self._args = args
        self._trunk = trunk
        run = read_run(args.run)
        self._config = config = plain_config(run.config)
        self._data = data = Dataset(config.data.path)
        self.seats = config.method.seat(data.clients)
        """Learner -> the clients whose shards it reads."""
        self._learner = {c: learner for learner, own in self.seats.items() for c in own}
        self._watch = Watch(args, self.seats, data.sha256)
        backbone = load_backbone(config.model.name)
        made_with = data.manifest["encoder"]["sha256"]
        if made_with != backbone.sha256:
            raise FellrayError(
                f"model.name {backbone.name}: has other weights ({backbone.sha256[:12]}) than the "
                f"encoder that {run.storage} was trained with ({made_with[:12]}); restore that "
                "encoder"
            )
        items = Items(data, load_tokenizer(config.model.name), config.model)
        self.catalogue = Catalogue(
            run.storage, items, config.model, made_with, args.threads, args.poll_s
        )
        anybodys = data.popularity / len(data.clients)
        self._anybodys_T = torch.from_numpy(anybodys).float().log1p()
        self._histories: OrderedDict[str, Histories] = OrderedDict()
        """Longest unused first."""
        folder = event_folder(run.storage, args.events)
        self.events = Events(folder, data, self.read_client, args.shards)
        """What users met since the data were prepared."""
        self._counting = threading.Lock()
        self._counts: Counts | None = None
        self._crossings: WeakKeyDictionary[Crossing, asyncio.Task[list[Ranking]]] = (
            WeakKeyDictionary()
        )
        self._batcher = Batcher(config.server.max_tokens)

        def make() -> Ends:
            torch.set_num_threads(args.threads)
            keep_freed_memory()
            own, cut = run.own(), plan_cut(backbone, config.model)
            middle = Middle(cut.outer, config.model.lora.r)
            rounds = Blends(run.storage, self.seats, own, middle)
            return Ends(config, backbone, items, rounds, own, args.adapters, args.rows)

        self._ends = self._batcher.call(make).result()

    @property
    def items(self) -> Items:
        """The catalogue as it is now."""
        return self.catalogue.items

    @property
    def clients(self) -> tuple[str, ...]:
        """Of the run, sorted."""
        return tuple(sorted(self._learner))

    @property
    def served(self) -> Served:
        """The round that the next query is answered from."""
        return self._watch.served

    def watch(self) -> None:
        """Take over new rounds and items from now on, as they are committed or added."""
        self._watch.start()
        self.catalogue.start()

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        self._watch.close()
        self.events.close()
        self.catalogue.close()
        self._batcher.close()

    async def recommend(self, queries: Sequence[ByUser | ByHistory]) -> list[Answer]:
        """Answers in the order of the queries, all from one round.

        Raises:
            Refusal: a query cannot be answered; with several, `field` begins with its place.
        """
        for tries in range(1, TRIES + 1):
            served = self.served
            try:
                async with asyncio.timeout(self._args.timeout_s):
                    return await self._answer(queries, served)
            except TimeoutError:
                raise Refusal(
                    503, "overloaded", f"no answer within {self._args.timeout_s:g} s"
                ) from None
            except (FellrayError, StaleLease) as error:
                # the round may have been given up by its run: then there is another
                _log.warning("round %d: %s", served.round, error)
                if tries < TRIES:
                    await asyncio.to_thread(self._watch.look)
        raise Refusal(503, "unavailable", f"round {served.round} cannot be read")

    def find_item(self, item_id: int) -> Item:
        """Raises:
        Refusal: there is none.
        """
        try:
            (at,) = self.items.find([item_id], "id")
        except Refusal as refusal:
            raise Refusal(404, refusal.code, refusal.message, "id") from None
        return self.items.describe(at)

    async def find_client(self, client: str) -> ClientState:
        """Raises:
        Refusal: there is none.
        """
        served, learner = self.served, self._learner.get(client)
        if learner is None:
            raise Refusal(404, "unknown_client", "the run has no such client", "id")
        own = await self.read_client(client)
        known = Known(learner, served.trained, True)
        layer = choose_layer(known, ())
        if layer == "mean":
            layer = choose_layer(known, await self._find_nearest(own.counts_I, served))
        return ClientState(
            client=client,
            users=len(own.users),
            round=served.round,
            layer=layer,
            validation_ndcg_at_10=served.validation.get(client),
        )

    def describe(self) -> RunState:
        """The run and what of it is served."""
        served = self.served
        return RunState(
            run=self._config.name,
            method=self._config.method.kind,
            round=served.round,
            promoted=served.promoted,
            committed=list(served.committed),
            clients=len(self._learner),
            items=len(self.items),
        )

    def num_users(self, client: str) -> int:
        """How many users a client of the run has."""
        return int(self._data.manifest["clients"][client]["users"])

    def has_client(self, client: str) -> bool:
        """Whether it is a client of the run."""
        return client in self._learner

    async def check(self) -> None:
        """Raises:
        Refusal: the trunk does not answer.
        """
        try:
            async with asyncio.timeout(CHECK_S):
                await self._trunk.ready()
        except Exception as error:
            _log.warning("the trunk does not answer: %r", error)
            raise Refusal(503, "not_ready", "the trunk does not answer") from None

    def gauges(self) -> dict[str, float]:
        """What a scrape shows besides requests."""
        sizes = self._batcher.sizes
        return {
            "round": self.served.round,
            "clients_held": len(self._histories),
            "batch_size_mean": sum(sizes) / len(sizes) if sizes else 0.0,
        }

    async def _answer(self, queries: Sequence[ByUser | ByHistory], served: Served) -> list[Answer]:
        asked = []
        for place, query in enumerate(queries):
            try:
                asked.append(await self._look_up(query, served))
            except Refusal as refusal:
                raise refusal if len(queries) == 1 else refusal.below(f"queries.{place}") from None
        rankings = await asyncio.gather(*(self._rank(one, served.round) for one in asked))
        return [
            self._tell(query, one.layer, served.round, ranking)
            for query, one, ranking in zip(queries, asked, rankings, strict=True)
        ]

    async def _look_up(self, query: ByUser | ByHistory, served: Served) -> _Asked:
        learner = self._learner.get(query.client)
        own = await self.read_client(query.client) if learner else None
        items = self.items
        width = len(items)
        if isinstance(query, ByUser):
            now = own is not None and query.as_of == "now"
            later = await self.events.later(query.client, query.user_id) if now else NOTHING
            found = own.find(query.user_id, query.as_of, later) if own else None
            if found is None:
                raise Refusal(404, "unknown_user", "the client has no such user", "user_id")
            history, seen = found
            reading = items.read_items(history) if len(history) else None
            width = width if query.as_of == "now" else items.trained
        else:
            reading = items.read(query.history) if query.history else None
            seen = reading.met if reading else np.empty(0, np.int64)
        known = Known(learner, served.trained, reading is not None)
        layer = choose_layer(known, ())
        adapters = learner or EVERYBODY
        if layer == "mean":
            counts_I = own.counts_I if own else np.bincount(seen, minlength=len(items))
            nearest = await self._find_nearest(counts_I, served)
            layer = choose_layer(known, nearest)
            adapters = name_blend(nearest) if nearest else EVERYBODY
        prior_T = own.prior_I if own and own.counts_I.any() else self._anybodys_T
        choice = choose(items, query.k, query.filters, query.candidates, seen)
        return _Asked(layer, adapters, reading, prior_T, items, width, choice)

    async def _rank(self, asked: _Asked, round: int) -> Ranking:
        """One ranking; its crossing is shared with whoever waited at the same moment."""
        if asked.layer == "popularity" or asked.reading is None:
            counts_I = F.pad(asked.prior_T, (0, len(asked.items) - len(asked.prior_T)))
            counts_I[asked.width :] = -torch.inf
            return rank(counts_I[None], [asked.choice])[0]
        prior_T = asked.prior_T if self._config.model.prior else None
        ids_L = asked.reading.ids_L
        question = Question(
            round, asked.learner, ids_L, prior_T, asked.items, asked.width, asked.choice
        )
        risen = self._batcher.submit(self._ends.rise, question, len(ids_L))
        crossing, place = await asyncio.wrap_future(risen)
        if crossing not in self._crossings:
            self._crossings[crossing] = asyncio.create_task(self._cross(crossing))
        # whoever gives up must not end the others' crossing
        rankings = await asyncio.shield(self._crossings[crossing])
        ranking: Ranking = rankings[place]
        return ranking

    async def _cross(self, crossing: Crossing) -> list[Ranking]:
        output = await self._trunk.forward(crossing.activation)
        size = len(output)
        finished = self._batcher.submit(self._ends.finish, (crossing, output), size)
        rankings: list[Ranking] = await asyncio.wrap_future(finished)
        return rankings

    def _tell(
        self, query: ByUser | ByHistory, layer: Layer, round: int, ranking: Ranking
    ) -> Answer:
        ids, titles = self.items.ids, self.items.titles
        places = zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True)
        return Answer(
            run=self._config.name,
            round=round,
            client=query.client,
            layer=layer,
            items=[
                Place(rank=rank, item_id=int(ids[item]), title=titles[item], score=score)
                for rank, (item, score) in enumerate(places, start=1)
            ],
        )

    async def _find_nearest(self, counts_I: np.ndarray, served: Served) -> tuple[str, ...]:
        counts = await asyncio.to_thread(self._count)
        return find_nearest(counts, counts_I, served.trained)

    def _count(self) -> Counts:
        """Every learner's counts, read once, when a client without adapters first asks."""
        with self._counting:
            if self._counts is None:
                self._counts = stack_counts(self._count_learners())
        return self._counts

    def _count_learners(self) -> Iterator[tuple[str, np.ndarray]]:
        for learner, clients in sorted(self.seats.items()):
            shards = (self._data.shard(client) for client in clients)
            total = np.zeros(self.items.trained, np.int64)
            for shard in shards:
                total += shard.counts(self.items.trained)
            yield learner, total

    async def read_client(self, client: str) -> Histories:
        """Of a client of the run; from disk where it was not asked for lately."""
        if client not in self._histories:
            shard = await asyncio.to_thread(self._data.shard, client)
            self._histories[client] = Histories(shard, self.items.trained)
            if len(self._histories) > self._args.shards:
                self._histories.popitem(last=False)
        self._histories.move_to_end(client)
        return self._histories[client]
