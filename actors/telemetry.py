"""Telemetry: a run's progress as Ray metrics, on the metrics endpoint that Ray opens on every node.

Nothing is sent anywhere: whoever may reach a node's endpoint asks it. The driver shows a round once
it is committed, the server what it does. It must not know how any of these numbers came about.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fellray.actors.session import metrics
from fellray.platform.batcher import Served
from fellray.platform.config import RunConfig

ROUND_GAUGES = {
    "fellray_round": "The last committed round.",
    "fellray_rounds": "How many rounds the run trains.",
    "fellray_round_seconds": "Seconds from the round before to this one's commit.",
    "fellray_histories_per_second": "Training histories a second, in the last round.",
    "fellray_clients_dormant": "Registered clients that were not asked in the last round.",
    "fellray_clients_asked": "Clients that were asked to train in the last round.",
    "fellray_clients_accepted": "Clients whose update entered the last round.",
    "fellray_clients_late": "Clients asked in the last round whose answer came too late to count.",
    "fellray_clients_refused": "Clients whose update was refused in the last round.",
    "fellray_loss": "Training loss of the last round, mean over clients.",
    "fellray_ndcg_at_10": "NDCG@10 of the last validation, over all users.",
    "fellray_worst_client_ndcg_at_10": "NDCG@10 of the last validation, worst client.",
}
"""Set by the driver."""
BYTES = "fellray_bytes_total"
"""Counted by the driver, by kind as in the ledger."""
ACTIVE = "fellray_clients_active"
"""Set by each server while a round goes on, of its own clients."""
BATCH_COUNTERS = {
    "fellray_server_batches_total": "Merged batches that the server has run.",
    "fellray_server_requests_total": "Requests in these batches.",
    "fellray_server_tokens_total": "Tokens in these batches.",
    "fellray_server_queue_seconds_total": "Seconds that these requests waited for their batch.",
    "fellray_server_busy_seconds_total": "Seconds that the server computed them.",
}
"""Counted by the server; requests per batch is the rate of one over the rate of another."""
NAMES = (*ROUND_GAUGES, BYTES, ACTIVE, *BATCH_COUNTERS)
"""Everything that fellray shows. Ray puts `ray_` before each."""


class RunTelemetry:
    """The driver's. To be made when Ray is there: what is made before is not exported."""

    def __init__(self, config: RunConfig, registered: int):
        """Args: registered: how many clients the run has."""
        self._gauges = {
            name: metrics.Gauge(name, words, ("run",)).set_default_tags({"run": config.name})
            for name, words in ROUND_GAUGES.items()
        }
        self._bytes = metrics.Counter(BYTES, "Bytes that crossed, by kind.", ("run", "kind"))
        self._bytes.set_default_tags({"run": config.name})
        self._rounds = config.train.rounds
        self._registered = registered

    def show(self, row: Mapping[str, Any]) -> None:
        """A committed round, by its row of metrics.jsonl."""
        for name, value in read_row(row, self._rounds, self._registered).items():
            self._gauges[name].set(value)
        for kind, size in row["bytes_by_kind"].items():
            if size:
                self._bytes.inc(size, {"kind": kind})


class ServerTelemetry:
    """The server's; its methods are called on the engine thread and on the actor's own."""

    def __init__(self, run: str):
        self._counters = [
            metrics.Counter(name, words, ("run",)).set_default_tags({"run": run})
            for name, words in BATCH_COUNTERS.items()
        ]
        words = "Clients of a server that have begun to train the round under way."
        self._active = metrics.Gauge(ACTIVE, words, ("run",)).set_default_tags({"run": run})
        self._begun: tuple[int, set[str]] = (-1, set())

    def begin(self, round: int, clients: Sequence[str]) -> None:
        """Clients begin a round."""
        newest, begun = self._begun
        self._begun = (round, set(clients) | (begun if round == newest else set()))
        self._active.set(len(self._begun[1]))

    def rest(self) -> None:
        """Nobody trains any more: the round is installed, or given up."""
        self._begun = (-1, set())
        self._active.set(0)

    def count(self, served: Served) -> None:
        """A batch was answered. One without tokens is a question about a round, no training."""
        if not served.size:
            return
        values = (1, served.requests, served.size, served.waited_s, served.busy_s)
        for counter, value in zip(self._counters, values, strict=True):
            if value > 0:
                counter.inc(value)


def read_row(row: Mapping[str, Any], rounds: int, registered: int) -> dict[str, float]:
    """A round's gauges by name; what the round does not have is left out.

    Args:
        row: as `Run.commit` returns it.
        rounds: how many the run trains.
        registered: how many clients it has.
    """
    values: dict[str, Any] = {
        "fellray_round": row["round"],
        "fellray_rounds": rounds,
        "fellray_round_seconds": row["seconds"],
        "fellray_histories_per_second": row.get("samples_per_second"),
        "fellray_loss": row.get("loss"),
        "fellray_ndcg_at_10": row.get("validation", {}).get("ndcg@10"),
        "fellray_worst_client_ndcg_at_10": row.get("worst_ndcg@10"),
    }
    if "losses" in row:
        answered, refused, late = len(row["losses"]), len(row["refused"]), len(row["late"])
        values |= {
            "fellray_clients_dormant": registered - answered - late,
            "fellray_clients_asked": answered + late,
            "fellray_clients_accepted": answered - refused,
            "fellray_clients_late": late,
            "fellray_clients_refused": refused,
        }
    return {name: float(value) for name, value in values.items() if value is not None}
