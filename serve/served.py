"""Which round of a run is served, kept up to date.

Whoever answers takes `Watch.served` once per query: it is replaced whole, so nothing is ever half
of one round. It must not know how queries arrive or are answered.
"""

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fellray.platform import promotion
from fellray.platform.errors import FellrayError
from fellray.platform.run import Run, read_run
from fellray.serve.args import Args
from fellray.serve.blends import AT_ONCE, Blends

_log = logging.getLogger("fellray.serve")


@dataclass(frozen=True)
class Served:
    """A committed round, and what follows from it."""

    round: int
    promoted: bool
    """Whether somebody named it."""
    trained: frozenset[str]
    """Learners whose adapters are not the start's any more."""
    validation: Mapping[str, float] = field(repr=False)
    """Client -> NDCG@10, where the round was validated."""
    committed: Sequence[int] = ()
    """All rounds that could be served."""


class Watch:
    """Looks after a run's folder."""

    def __init__(self, args: Args, learners: Collection[str], data_sha256: str):
        """Args: data_sha256: of the prepared data that will be used.

        Raises:
            FellrayError: the run has no such round, or was trained on other data.
        """
        self._args = args
        self._data_sha256 = data_sha256
        self._run = read_run(args.run)
        self._rounds = Blends(self._run.storage, learners)
        self._looking = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
        self._signs = self._read_signs()
        self.served = self._find()

    def start(self) -> None:
        """Look again every `poll_s` seconds, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Serve what is to be served now; a round that cannot be read changes nothing."""
        with self._looking:
            try:
                signs = self._read_signs()
                if signs == self._signs:
                    return
                found = self._find()
                if found.round != self.served.round:
                    _log.info("%s: round %d is served", self._run.storage, found.round)
                self.served, self._signs = found, signs
            except FellrayError as error:
                _log.warning("%s: still round %d: %s", self._run.storage, self.served.round, error)

    def _work(self) -> None:
        while not self._ended.wait(self._args.poll_s):
            self.look()

    def _read_signs(self) -> tuple[object, ...]:
        """What changes whenever another round may have to be served; little is read for it."""
        storage = self._run.storage
        folders = tuple(storage.list("rounds"))
        whole = bool(folders) and storage.exists(f"rounds/{folders[-1]}/manifest.json")
        return folders, whole, promotion.read_promotion(storage)

    def _find(self) -> Served:
        run, args = self._run, self._args
        committed = run.rounds.committed()
        if not committed:
            raise FellrayError(
                f"{run.storage}: no round is committed yet; first `fellray train` it"
            )
        promoted = promotion.read_promotion(run.storage).served
        if isinstance(args.round, int):
            chosen, promoted = args.round, None
        elif promoted is not None:
            chosen = promoted
        else:
            chosen = committed[-1] if args.round == "latest" else run.best_round()
        if chosen not in committed:
            raise FellrayError(
                f"{run.storage}: round {chosen} is not committed; give one of these as `round`: "
                f"{', '.join(map(str, committed))}"
            )
        if run.rounds.facts(chosen)["data_sha256"] != self._data_sha256:
            raise FellrayError(
                f"{run.config.data.path}: holds other data than {run.storage} was trained on; "
                "restore that folder, or train a new run on the data that is there now"
            )
        return Served(
            chosen,
            promoted is not None,
            self._rounds.trained(chosen, "client.values"),
            _validation(run, chosen),
            committed,
        )


def _validation(run: Run, round: int) -> Mapping[str, float]:
    rows = [row for row in run.journal.rows("metrics") if row["round"] == round]
    return dict(rows[-1].get("validation_per_client") or {}) if rows else {}


def refuse_passing(args: Args, run: Run) -> None:
    """Raises:
    FellrayError: `round` names a round that a training under way may give up.
    """
    round, storage = args.round, run.storage
    if not isinstance(round, int) or round in (0, *promotion.read_promotion(storage).rounds):
        return
    if storage.is_locked("train"):
        raise FellrayError(
            f"round={round}: {storage} is being trained, which may delete that round while it is "
            f"served; `fellray promote {args.run} {round}` keeps and serves it, without round="
        )


def verify(run: Run, round: int, learners: Sequence[str]) -> None:
    """Read what every learner needs of a round, once.

    Raises:
        FellrayError: a page is missing or damaged.
    """
    for at in range(0, len(learners), AT_ONCE):
        few = learners[at : at + AT_ONCE]
        run.rounds.load(round, few, ["client.values", "trunk.values"])
    if run.config.server.shared_adapter:
        run.rounds.load_shared(round, "shared.values")
