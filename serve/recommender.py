"""The recommender: a run's private side, answering queries from one committed round each.

It holds bottom, top, item vectors, histories, counts and a bounded number of adapters; the trunk is
somewhere else and is asked. Whoever waits crosses together. A query is pinned to the round that is
served when it arrives. This file must not know Ray or HTTP, nor how questions are batched.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from fellray.platform.allocator import keep_freed_memory
from fellray.platform.device import choose_device
from fellray.platform.encoder import load_backbone, load_tokenizer
from fellray.platform.errors import FellrayError
from fellray.platform.messages import StaleLease
from fellray.platform.middle import Middle
from fellray.platform.origin import event_folder, find_first
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.platform.split import plan_cut
from fellray.serve.args import Args
from fellray.serve.blends import Blends, find_private
from fellray.serve.catalogue import Catalogue
from fellray.serve.ends import Ends, Question
from fellray.serve.events import Events
from fellray.serve.ferry import Far, Ferry
from fellray.serve.histories import Histories
from fellray.serve.items import Items
from fellray.serve.ladder import Known, Layer, choose_layer
from fellray.serve.lookup import Asked, Lookup
from fellray.serve.ranking import Ranking, rank
from fellray.serve.refusal import Refusal, refuse_client
from fellray.serve.schema import (
    Answer,
    ByHistory,
    ByUser,
    ClientState,
    Item,
    Place,
    RunState,
)
from fellray.serve.served import Served, Watch
from fellray.serve.trunk import plain_config

TRIES = 3
"""Times a query is begun before it is refused: a round may be deleted while it is served."""
CHECK_S = 5.0
"""Seconds that the trunk has to say that it is there."""
_log = logging.getLogger("fellray.serve")


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
        data = Dataset(config.data.path)
        backbone = load_backbone(config.model.name)
        if backbone.generative:
            raise FellrayError(
                f"{run.storage}: was trained with a model that writes titles, which cannot be "
                f"served yet; `fellray evaluate {args.run}` ranks with it"
            )
        if config.method.moves_base():
            raise FellrayError(
                f"{run.storage}: method.kind={config.method.kind} has changed the frozen weights, "
                f"which cannot be served yet; `fellray evaluate {args.run}` ranks with them, and "
                "base/ and adapters/ hold the model"
            )
        made_with = data.manifest["encoder"]["sha256"]
        if made_with != backbone.sha256:
            raise FellrayError(
                f"model.name {backbone.name}: has other weights ({backbone.sha256[:12]}) than the "
                f"encoder that {run.storage} was trained with ({made_with[:12]}); restore that "
                "encoder"
            )
        items = Items(data, load_tokenizer(config.model.name), config.model)
        self.catalogue = Catalogue(
            find_first(run.storage), items, config.model, made_with, args.threads, args.poll_s
        )
        folder = event_folder(run.storage, args.events)
        self._lookup = Lookup(config, data, self.catalogue, folder, args.shards, args.timeout_s)
        self._watch = Watch(args, self._lookup.seats, data.sha256)

        def make() -> Ends:
            torch.set_num_threads(args.threads)
            keep_freed_memory()
            own, cut = run.own(), plan_cut(backbone, config.model)
            middle = Middle(cut.outer, config.model.lora.r)
            private_p = find_private(config, cut.outer)
            rounds = Blends(run.storage, self._lookup.seats, own, middle, private_p)
            device = choose_device(args.recommender_gpus > 0)
            return Ends(config, backbone, items, rounds, own, args.adapters, args.rows, device)

        self._ferry = Ferry(make, trunk, args.rows)
        self._lookup.start(self.served)

    @property
    def items(self) -> Items:
        """The catalogue as it is now."""
        return self.catalogue.items

    @property
    def events(self) -> Events:
        """What users met since the data were prepared."""
        return self._lookup.events

    @property
    def seats(self) -> Mapping[str, Sequence[str]]:
        """Learner -> the clients whose shards it reads."""
        return self._lookup.seats

    @property
    def clients(self) -> tuple[str, ...]:
        """Of the run, sorted."""
        return tuple(sorted(self._lookup.learner))

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
        self._ferry.close()

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
        why = f"no answer from round {served.round}: the log has why"
        raise Refusal(503, "unavailable", why)

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
        served, learner = self.served, self._lookup.learner.get(client)
        if learner is None:
            raise refuse_client("id")
        own = await self.read_client(client)
        known = Known(learner, served.trained, True)
        layer = choose_layer(known, ())
        if layer == "mean":
            layer = choose_layer(known, await self._lookup.find_nearest(own.counts_I, served))
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
            clients=len(self._lookup.learner),
            items=len(self.items),
        )

    def num_users(self, client: str) -> int:
        """How many users a client of the run has."""
        return self._lookup.num_users(client)

    async def read_client(self, client: str) -> Histories:
        """See `Lookup.read`."""
        return await self._lookup.read(client)

    def has_client(self, client: str) -> bool:
        """Whether it is a client of the run."""
        return client in self._lookup.learner

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
        return {
            "round": self.served.round,
            "clients_held": self._lookup.held,
        }

    def totals(self) -> dict[str, int]:
        """What a scrape shows besides: see `Ferry.totals`."""
        return self._ferry.totals()

    async def _answer(self, queries: Sequence[ByUser | ByHistory], served: Served) -> list[Answer]:
        asked = []
        for place, query in enumerate(queries):
            try:
                asked.append(await self._lookup.look_up(query, served))
            except FellrayError as error:
                _log.error("client %s: %s", query.client, error)
                refusal = Refusal(503, "unavailable", "data cannot be read: the log has why")
            except Refusal as one:
                refusal = one
            else:
                continue
            raise refusal if len(queries) == 1 else refusal.below(f"queries.{place}") from None
        rankings = await asyncio.gather(*(self._rank(one, served.round) for one in asked))
        return [
            self._tell(query, one.layer, served.round, ranking)
            for query, one, ranking in zip(queries, asked, rankings, strict=True)
        ]

    async def _rank(self, asked: Asked, round: int) -> Ranking:
        if asked.layer == "popularity" or asked.reading is None:
            counts_I = F.pad(asked.prior_T, (0, len(asked.items) - len(asked.prior_T)))
            counts_I[asked.width :] = -torch.inf
            return rank(counts_I[None], [asked.choice])[0]
        prior_T = asked.prior_T if self._config.model.prior else None
        ids_L = asked.reading.ids_L
        question = Question(
            round, asked.learner, ids_L, prior_T, asked.items, asked.width, asked.choice
        )
        return await self._ferry.rank(question)

    def _tell(
        self, query: ByUser | ByHistory, layer: Layer, round: int, ranking: Ranking
    ) -> Answer:
        ids, titles, name = self.items.ids, self.items.titles, self.items.source_id
        places = zip(ranking.items.tolist(), ranking.scores.tolist(), strict=True)
        return Answer(
            run=self._config.name,
            round=round,
            client=query.client,
            layer=layer,
            items=[
                Place(
                    rank=rank,
                    item_id=int(ids[item]),
                    title=titles[item],
                    score=score,
                    source_id=name(item),
                )
                for rank, (item, score) in enumerate(places, start=1)
            ],
        )
