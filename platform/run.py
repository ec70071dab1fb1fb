"""A run: its folder, its lock, its committed rounds, its records and its summary.

It does not know how a round comes about. Order of events at a round's end: holders have staged
their state, then the records are appended, then the manifest is renamed into place: now the round
happened. Records of rounds that did not happen are dropped when the run is opened again.

Layout: config.json, own.json, environment.json, metrics.jsonl, ledger.jsonl, rounds/NNNNNN/,
summary.json, costs.json, report.html, adapters/. A run that is served, or goes on in another, has
serving.json, tokens.json, items/, events/, continuation.json, origin.json as well.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

from fellray.platform import config as configs
from fellray.platform.accountant import Spending, open_account
from fellray.platform.config import RunConfig
from fellray.platform.environment import environment
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.ledger import total
from fellray.platform.messages import Damaged, LedgerRow
from fellray.platform.origin import read_origin
from fellray.platform.outcome import Outcome, describe_outcome, round_seconds
from fellray.platform.own import ALIKE, Own, read_own
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.promotion import read_promotion
from fellray.platform.rounds import Rounds
from fellray.platform.storage import Storage

Answer = TypeVar("Answer")

COSTS = "costs.json"
"""What one client needs, where it was measured."""


class Run:
    """One training run on storage. Open it with `open_run`."""

    def __init__(
        self,
        config: RunConfig,
        data_sha256: str = "",
        still_locked: Callable[[], None] = lambda: None,
        storage: Storage | None = None,
    ):
        """Args: storage: the run's folder where it is not the config's `storage`/`name`."""
        self.config = config
        self.storage = storage or Storage(config.storage).sub(config.name)
        self.rounds = Rounds(self.storage)
        self.journal = Journal(self.storage)
        self._data_sha256 = data_sha256
        self._still_locked = still_locked
        self._clock = time.monotonic()
        self._best: tuple[int, float] | None = None
        """Round and quality, once this process has committed a round."""
        self.events: list[str] = []
        """What was found damaged and stands in no row yet."""

    @cached_property
    def spending(self) -> Spending:
        """What its clients have spent of their privacy, up to the last recorded round."""
        rows = {row["round"]: row for row in self.journal.rows("metrics")}
        continues = read_origin(self.storage) is not None
        return open_account(self.config, rows.values(), continues)

    def to_go(self) -> range:
        """Rounds still to be trained: those after the last committed one."""
        latest = self.rounds.latest()
        return range(0 if latest is None else latest + 1, self.config.train.rounds + 1)

    def commit(
        self, round: int, outcome: Outcome, ledger: Sequence[LedgerRow], events: Sequence[str]
    ) -> dict[str, Any]:
        """Make a round happen: records first, then the manifest; old rounds are pruned after.

        Returns:
            The round's row of metrics.jsonl.
        """
        carried = self._mended(lambda: self.rounds.carry(round, outcome.staged))
        row = self.record(round, outcome, ledger, events)
        self._still_locked()
        staged = [*outcome.staged, *carried]
        self.rounds.commit(round, staged, {"data_sha256": self._data_sha256})
        self._best = self._best_of([row], self._best) if self._best else self._read_best()
        keep = [0, self._best[0], *read_promotion(self.storage).rounds]
        self._mended(lambda: self.rounds.prune(self.config.keep_last, keep))
        return row

    def without_row(self) -> int | None:
        """The last committed round, where nothing was recorded of it: another run made it."""
        latest = self.rounds.latest()
        told = {row["round"] for row in self.journal.rows("metrics")}
        return None if latest in told else latest

    def record(
        self, round: int, outcome: Outcome, ledger: Sequence[LedgerRow], events: Sequence[str]
    ) -> dict[str, Any]:
        """Add a round's rows to the records.

        Returns:
            That of metrics.jsonl.
        """
        now, spending = time.monotonic(), self.spending
        row: dict[str, Any] = {"round": round, "seconds": round_seconds(now - self._clock)}
        row |= describe_outcome(outcome) | {
            "bytes": sum(entry.bytes for entry in ledger),
            "bytes_by_kind": total(ledger),
            "events": [*self.events, *events],
        }
        if not isinstance(self.config.privacy, NoPrivacy):
            spending.take_part([*row.get("losses", ()), *row.get("late", ())])
            row["privacy"] = spending.row()
        self.events.clear()
        self._clock = now
        self.journal.record("metrics", [row])
        self.journal.record("ledger", [{"round": round, **vars(entry)} for entry in ledger])
        return row

    def is_finished(self) -> bool:
        """Whether its last round is trained, or the last that its privacy budget allows, and its
        summary is written."""
        if not self.storage.exists("summary.json"):
            return False
        done = (self.rounds.latest() or 0) >= self.config.train.rounds
        return done or ran_out(self.read_json("summary.json"))

    def best_round(self) -> int:
        """The round with the best validation by `evaluation.select`; the earliest among equals."""
        return self._read_best()[0]

    def look_for_damage(self) -> None:
        """Note in `events` what was decided without a row that says so, and what does not count."""
        self.events += [f"{why}; the round is done again" for why in self.rounds.dropped()]
        if verdicts := self.rounds.verdicts():
            told = {event for row in self.journal.rows("metrics") for event in row["events"]}
            self.events += [event for event in verdicts if event not in told]

    def _mended(self, work: Callable[[], Answer]) -> Answer:
        """Do it, once more after each decision on a damaged file."""
        while True:
            try:
                return work()
            except Damaged as damage:
                if not (mended := self.rounds.mend(damage)):
                    raise
                self.events += mended

    def _read_best(self) -> tuple[int, float]:
        # rows are written before their round is committed
        latest = self.rounds.latest() or 0
        rows = self.journal.rows("metrics")
        return self._best_of([row for row in rows if row["round"] <= latest], (0, -math.inf))

    def _best_of(
        self, rows: Sequence[Mapping[str, Any]], best: tuple[int, float]
    ) -> tuple[int, float]:
        """The best round and its quality among later rows, oldest first, and the best so far."""
        key = self.config.evaluation.select
        for row in rows:
            if row.get("validation"):
                value = row["worst_ndcg@10"] if key == "worst_ndcg@10" else row["validation"][key]
                if value > best[1]:
                    best = (row["round"], float(value))
        return best

    def own(self) -> Own:
        """What clients have of their own in this run, whatever has become of the file since.

        Raises:
            FellrayError: as `read_json`.
        """
        return ALIKE if self.config.clients.own is None else Own(**self.read_json("own.json"))

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files.

        Raises:
            FellrayError: it is not there or damaged.
        """
        return read_tree(self.storage, name)


@contextmanager
def open_run(config: RunConfig, data_sha256: str) -> Iterator[Run]:
    """Hold the run's folder: a new run, or the same config's interrupted one.

    Raises:
        FellrayError: another process holds it, it was begun with another config or other data, or
            as `read_own` and `Spending.check_budget`.
    """
    own = read_own(config)
    config = own.settle(config)
    storage = Storage(config.storage).sub(config.name)
    with storage.lock("train") as still_locked:
        run = Run(config, data_sha256, still_locked)
        if storage.exists("config.json"):
            _refuse_other(run, data_sha256, own)
        if own != ALIKE:
            run.journal.write_json("own.json", own.tree())
        storage.write("config.json", configs.dump(config).encode())
        run.journal.write_json("environment.json", environment())
        run.journal.resume(run.rounds.latest())
        run.look_for_damage()
        run.spending.check_budget()
        yield run


def read_run(path: str) -> Run:
    """A run that exists, by its folder or URI.

    Raises:
        FellrayError: there is no run.
    """
    storage = Storage(path)
    if not storage.exists("config.json"):
        raise FellrayError(f"{storage}: holds no run (no config.json); `fellray runs` lists runs")
    return Run(
        configs.parse(read_tree(storage, "config.json"), f"{storage}/config.json"), storage=storage
    )


def read_tree(storage: Storage, name: str) -> dict[str, Any]:
    """A JSON file in a run's folder.

    Raises:
        FellrayError: it is not there or damaged.
    """
    try:
        tree = json.loads(storage.read(name))
    except ValueError as error:
        raise FellrayError(
            f"{storage}/{name}: is damaged ({error}); train the run again under another name"
        ) from None
    if not isinstance(tree, dict):
        raise FellrayError(f"{storage}/{name}: is damaged: no JSON object")
    return tree


def _refuse_other(run: Run, data_sha256: str, own: Own) -> None:
    """A run goes on with the config and data it began with; its length and place may change."""
    held = _flatten(read_tree(run.storage, "config.json"))
    wanted = _flatten(json.loads(configs.dump(run.config)))
    changed = sorted(
        name
        for name in held.keys() | wanted.keys()
        if held.get(name) != wanted.get(name) and name not in _MAY_CHANGE
    )
    latest = run.rounds.latest()
    if latest is not None and run.rounds.facts(latest)["data_sha256"] != data_sha256:
        changed.append(f"the prepared data in {run.config.data.path}")
    if "clients.own" not in changed and run.own() != own:
        changed.append(f"what {run.config.clients.own} holds")
    if changed:
        raise FellrayError(
            f"{run.storage}: was begun with another config (differs in {', '.join(changed)}); "
            "give the new run another name=..., or remove the folder"
        )


def ran_out(summary: Mapping[str, Any]) -> bool:
    """Whether the privacy budget ended the run."""
    return (summary.get("privacy") or {}).get("stopped_before") is not None


_MAY_CHANGE = (
    "storage",
    "train.rounds",
    "keep_last",
    "privacy.epsilon",
    "clients.per_actor",
    "cluster.address",
    "cluster.wait_for_nodes_s",
)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
