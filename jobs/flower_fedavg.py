"""The job of `rival_job.py` under Flower's simulation engine: a rival for `rivals.py` to measure.

It runs in an environment of its own, with flwr, torch, numpy and safetensors, and must not know
fellray. Flower's own FedAvg averages the flat vectors of adapters; only who trains in which round
is prescribed, so that both sides train the same clients on the same rows.

    python jobs/flower_fedavg.py FOLDER      (writes FOLDER/flower.json and flower.safetensors)

Shapes: P parameters of one client.
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from plain_learner import Job, open_job
from safetensors.numpy import save_file

client_app = ClientApp()
server_app = ServerApp()


@client_app.train()
def train(message: Message, _: Context) -> Message:
    """One client's round."""
    config = message.content["config"]
    (theta_P,) = message.content["arrays"].to_numpy_ndarrays()
    job = open_job(config["folder"])
    theta_P, loss = job.train(theta_P, config["client"], config["server-round"])
    metrics = MetricRecord(
        {"num-examples": job.facts["local_samples"], "client": config["place"], "loss": loss}
    )
    content = RecordDict({"arrays": ArrayRecord([theta_P]), "metrics": metrics})
    return Message(content, reply_to=message)


class Prescribed(FedAvg):
    """FedAvg over the cohorts of the job; a client is always the same node."""

    def __init__(self, job: Job):
        clients = job.facts["clients"]
        super().__init__(
            fraction_train=len(job.cohorts[0]) / len(clients),
            fraction_evaluate=0.0,
            min_evaluate_nodes=0,
            min_available_nodes=len(clients),
        )
        self._job = job
        self._place = {client: i for i, client in enumerate(clients)}
        self.losses: list[dict[str, float]] = []
        """Of each round: client -> mean loss."""
        self.stamps: list[float] = []
        """When the first round began, and when each round ended."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each client of the round."""
        while len(nodes := sorted(grid.get_node_ids())) < len(self._place):
            time.sleep(0.1)  # the simulation registers its nodes while the server starts
        if not self.stamps:
            self.stamps.append(time.perf_counter())
        messages = []
        for client in self._job.cohorts[server_round - 1]:
            told = {"client": client, "place": self._place[client], "server-round": server_round}
            record = ConfigRecord({"folder": str(self._job.folder), **told})
            content = RecordDict({"arrays": arrays, "config": record})
            node = nodes[self._place[client]]
            messages.append(Message(content, dst_node_id=node, message_type=MessageType.TRAIN))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's own mean; the losses are noted."""
        replies = list(replies)
        result: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(
            server_round, replies
        )
        clients = self._job.facts["clients"]
        told = [reply.content["metrics"] for reply in replies if not reply.has_error()]
        losses = {clients[int(m["client"])]: float(m["loss"]) for m in told}
        assert len(losses) == len(self._job.cohorts[server_round - 1]), "a client failed"
        self.losses.append(losses)
        self.stamps.append(time.perf_counter())
        return result


@server_app.main()
def main(grid: Grid, _: Context) -> None:
    """All rounds, then the files."""
    job = open_job(sys.argv[1])
    strategy = Prescribed(job)
    result = strategy.start(grid, ArrayRecord([job.start_P]), num_rounds=len(job.cohorts))
    (theta_P,) = result.arrays.to_numpy_ndarrays()
    save_file({"theta_P": theta_P}, job.folder / "flower.safetensors")
    found = {"losses": strategy.losses, "stamps": strategy.stamps}
    (job.folder / "flower.json").write_text(json.dumps(found), "utf-8")


def simulate(folder: str) -> None:
    """As many client workers as the job has cores, each of one thread."""
    facts: dict[str, Any] = json.loads((Path(folder) / "job.json").read_text("utf-8"))
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=len(facts["clients"]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "address": "local",
                "num_cpus": facts["cores"],
                "include_dashboard": False,
                "log_to_driver": False,
            },
        },
    )


if __name__ == "__main__":
    simulate(sys.argv[1])
