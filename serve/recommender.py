"""Recommend with a trained run: a history's titles in, the client's own ranking out.

The whole model in one process, in plain torch. It must not know Ray, DeepSpeed or how a request
arrives. Scores are computed by the same parts as in the run's evaluation.

Shapes: N histories, H items of a history, L real tokens of all rows together, I items, d width,
S learners, P parameters of one learner.
"""

import difflib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fellray.platform.adapters import Bank, cut_, rescale, views
from fellray.platform.encoder import Backbone, Tokens, load_backbone, load_tokenizer, tokenize
from fellray.platform.errors import FellrayError
from fellray.platform.reader import EVALUATION_ROWS, assemble
from fellray.platform.retrieval import Scorer
from fellray.platform.rows import Rows
from fellray.platform.run import Run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.split import cut_model
from fellray.platform.tower import Tower

MOST_NAMED = 10
"""Clients that an error names one by one."""


@dataclass(frozen=True)
class Recommendation:
    """One place of a ranking."""

    rank: int
    """1 is the best."""
    item_id: int
    title: str
    score: float
    """Cosine / temperature, plus the client's prior; comparable within one ranking only."""


class Recommender:
    """The models of all clients of a run at one round. Open it with `Recommender.open`.

    Threads may share it; their requests go through the model one after the other.
    """

    def __init__(self, run: Run, round: int):
        """Args: round: a committed one. Raises as `open`."""
        self._config = config = run.config
        self._data = _open_data(run, round)
        backbone = load_backbone(config.model.name)
        _refuse_other_encoder(run, self._data, backbone)
        self._tokenizer = load_tokenizer(config.model.name)
        self._tokens = tokenize(self._tokenizer, self._data.titles, config.model.max_tokens)
        self._vectors_Id = self._data.vectors.numpy()
        self._items_of: dict[str, list[int]] = {}
        for item, title in enumerate(self._data.titles):
            self._items_of.setdefault(_fold(title), []).append(item)

        seats = config.method.seat(self._data.clients)
        learners = sorted(seats)
        self._slot = {c: slot for slot, learner in enumerate(learners) for c in seats[learner]}
        self._shards = {client: self._data.shard(client) for client in sorted(self._slot)}
        self.clients = tuple(self._shards)
        """Sorted."""
        self.round = round

        self._model_lock = threading.Lock()
        parts = cut_model(backbone, config.model)
        sites, lora = parts.cut.sites, config.model.lora
        loaded = run.rounds.load(round, learners, ["client.values", "trunk.values"])
        own, everyone = run.own(), torch.arange(len(learners))
        ranks = own.ranks_of(learners, lora.r)
        bank = Bank(sites["bottom"] + sites["top"], lora, config.train, len(learners))
        bank.set_ranks(everyone, ranks)
        bank.reset(everyone, {"values": loaded["client.values"]})
        self._tower = Tower(parts.bottom, parts.top, self._tokens.pad, bank)
        self._trunk = parts.trunk
        personal = views(loaded["trunk.values"], sites["trunk"], lora.r)
        if own.ranks:
            # a page that is everyone's came as one row for all: no two could be cut apart
            personal = [(a.clone(), b.clone()) for a, b in personal]
            cut_(personal, everyone, torch.tensor(ranks))
            personal = rescale(personal, lora, ranks)
        self._trunk_sets = [personal]
        if config.server.shared_adapter:
            shared_SP = run.rounds.load_shared(round, "shared.values").expand(len(learners), -1)
            self._trunk_sets.append(views(shared_SP, sites["trunk"], lora.r))

    @classmethod
    def open(cls, path: str, round: int | None = None) -> "Recommender":
        """The run in a folder or at a URI, at its best round or at another committed one.

        Raises:
            FellrayError: there is no run, the round is not committed or damaged, the prepared data
                or the encoder are missing or not those that the run was trained with.
        """
        run = read_run(path)
        committed = run.rounds.committed()
        if not committed:
            raise FellrayError(
                f"{run.storage}: no round is committed yet; first `fellray train` it"
            )
        chosen = run.best_round() if round is None else round
        if chosen not in committed:
            raise FellrayError(
                f"{run.storage}: round {chosen} is not committed; give one of these as `round`: "
                f"{', '.join(map(str, committed))}"
            )
        return cls(run, chosen)

    def split_history(self, text: str) -> list[str]:
        """The titles in `title; title`; a title of the catalogue may hold a semicolon itself."""
        parts = [part for part in text.split(";") if part.strip()]
        titles: list[str] = []
        while parts:
            lengths = range(len(parts), 1, -1)
            known = (n for n in lengths if self.knows(";".join(parts[:n])))
            taken = next(known, 1)
            titles.append(";".join(parts[:taken]).strip())
            parts = parts[taken:]
        return titles

    def knows(self, title: str) -> bool:
        """Whether the catalogue has the title, up to case and surrounding space."""
        return _fold(title) in self._items_of

    def recommend(
        self, client: str, titles: Sequence[str], k: int = 10, with_prior: bool = True
    ) -> list[Recommendation]:
        """The client's best items for a user who met these titles.

        Args:
            client: whose adapters and prior to use.
            titles: what the user met, oldest first. They need not be in the catalogue; items whose
                title is among them, up to case and surrounding space, are not recommended.
            k: how many; fewer come back where fewer items are left.
            with_prior: False leaves out the client's counts; a run without prior has none anyway.

        Raises:
            FellrayError: there is no such client, a title is empty, or k is out of range.
        """
        self._refuse(client, k)
        texts = [] if isinstance(titles, str) else [title.strip() for title in titles]
        if not texts or not all(texts):
            raise FellrayError(
                f"titles {titles!r}: pass a list of at least one title, oldest first, none empty"
            )
        met = {item for text in texts for item in self._items_of.get(_fold(text), ())}
        seen = [np.array(sorted(met), np.int64)]
        tokens = tokenize(self._tokenizer, texts, self._config.model.max_tokens)
        newest_1H = np.arange(len(texts))[None, -self._config.model.max_history :]
        return self._rank(client, tokens, newest_1H, seen, k, with_prior)[0]

    def recommend_users(
        self, client: str, histories: Sequence[np.ndarray], k: int = 10, with_prior: bool = True
    ) -> list[list[Recommendation]]:
        """The same for many users of one client at once, whose histories are item indices.

        For held-out users this is the ranking of the run's evaluation, except that evaluation lets
        an item be found again that the user had met before.

        Args:
            client: whose adapters and prior to use.
            histories: per user, indices of items, oldest first; none of them is recommended.
            k: as in `recommend`.
            with_prior: as in `recommend`.

        Raises:
            FellrayError: there is no such client, a history is empty or names an item that is not
                there, or k is out of range.
        """
        self._refuse(client, k)
        num_items = len(self._data.titles)
        met = [np.asarray(items, np.int64) for items in histories]
        for user, items in enumerate(met):
            if not len(items) or items.min() < 0 or items.max() >= num_items:
                raise FellrayError(
                    f"histories[{user}]: pass at least one item index, oldest first, each from 0 "
                    f"to {num_items - 1}"
                )
        ranked = []
        for at in range(0, len(met), EVALUATION_ROWS):
            chunk = met[at : at + EVALUATION_ROWS]
            items_NH = np.full((len(chunk), self._config.model.max_history), -1, np.int64)
            for row, items in zip(items_NH, chunk, strict=True):
                newest = items[-len(row) :]
                row[len(row) - len(newest) :] = newest
            ranked += self._rank(client, self._tokens, items_NH, chunk, k, with_prior)
        return ranked

    def _rank(
        self,
        client: str,
        tokens: Tokens,
        items_NH: np.ndarray,
        seen: Sequence[np.ndarray],
        k: int,
        with_prior: bool,
    ) -> list[list[Recommendation]]:
        """Rankings of N users; equal scores stand in the order of the items."""
        prior = with_prior and self._config.model.prior
        shard, temperature = self._shards[client], self._config.model.temperature
        with torch.no_grad():
            u_Nd = self._encode(self._slot[client], tokens, items_NH)
            scorer = Scorer(self._vectors_Id, [shard], temperature, prior)
            scores_NI = scorer.score(u_Nd, torch.zeros(len(u_Nd), dtype=torch.int64))
        for scores_I, items in zip(scores_NI, seen, strict=True):
            scores_I[torch.from_numpy(items)] = -torch.inf
        best = scores_NI.sort(dim=1, descending=True, stable=True)
        rankings = zip(best.indices[:, :k].tolist(), best.values[:, :k].tolist(), strict=True)
        ids, titles = self._data.item_ids, self._data.titles
        return [
            [
                Recommendation(rank, int(ids[item]), titles[item], score)
                for rank, (item, score) in enumerate(zip(*ranking, strict=True), start=1)
                if score > -np.inf
            ]
            for ranking in rankings
        ]

    def _encode(self, slot: int, tokens: Tokens, items_NH: np.ndarray) -> Tensor:
        """Users' unit vectors [N, d] by one learner's adapters."""
        model = self._config.model
        ids_L, lengths_N = assemble(tokens, items_NH, model.max_tokens)
        rows = Rows(lengths_N, model.pad_multiple)
        slot_N = torch.full((len(items_NH),), slot)

        def cross(h_Ld: Tensor) -> Tensor:
            outputs = []
            for group in rows.groups:
                own = slot_N[group.rows_n]
                sets = [[(a[own], b[own]) for a, b in pairs] for pairs in self._trunk_sets]
                outputs.append(self._trunk(rows.pad(h_Ld, group), group.mask_nT, sets))
            return rows.pack(outputs)

        # a forward pass leaves its adapters in the blocks while it runs: two at once would mix them
        with self._model_lock:
            u_Nd, _ = self._tower.encode(rows, ids_L, slot_N, cross, train=False)
        return u_Nd

    def _refuse(self, client: str, k: int) -> None:
        if client not in self._shards:
            near = difflib.get_close_matches(client, self.clients, n=1, cutoff=0)[0]
            few = len(self.clients) <= MOST_NAMED
            told = ", ".join(self.clients) if few else f"{len(self.clients)}, the nearest {near!r}"
            raise FellrayError(f"client {client!r}: the run has no such client; it has {told}")
        num_items = len(self._data.titles)
        if not 1 <= k <= num_items:
            raise FellrayError(f"k={k}: must be from 1 to {num_items}, the number of items")


def _open_data(run: Run, round: int) -> Dataset:
    """The data the run was trained on, and no other."""
    data = Dataset(run.config.data.path)
    if data.sha256 != run.rounds.facts(round)["data_sha256"]:
        raise FellrayError(
            f"{run.config.data.path}: holds other data than {run.storage} was trained on; restore "
            "that folder, or train a new run on the data that is there now"
        )
    return data


def _refuse_other_encoder(run: Run, data: Dataset, backbone: Backbone) -> None:
    made_with = data.manifest["encoder"]["sha256"]
    if made_with != backbone.sha256:
        raise FellrayError(
            f"model.name {backbone.name}: has other weights ({backbone.sha256[:12]}) than the "
            f"encoder that {run.storage} was trained with ({made_with[:12]}); restore that encoder"
        )


def _fold(title: str) -> str:
    """What two titles that count as the same have in common."""
    return title.strip().casefold()
