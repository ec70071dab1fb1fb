"""The job of `rival_job.py` under pfl's simulation: a rival for `rivals.py` to measure.

It runs in an environment of its own, with pfl, torch, numpy and safetensors, and must not know
fellray. pfl's own FederatedAveraging and its PyTorch model train and average; only who trains in
which round is prescribed, so that both sides train the same clients on the same rows.

    torchrun --standalone --nproc-per-node 2 jobs/pfl_fedavg.py FOLDER
    (writes FOLDER/pfl.json and pfl.safetensors)
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.context import UserContext
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.postprocessor.base import Postprocessor
from pfl.stats import TrainingStatistics
from plain_learner import Job, Learner, open_job
from safetensors.numpy import save_file


class Noted(Postprocessor):
    """Notes each client's mean training loss; changes nothing."""

    def __init__(self, learner: Learner):
        self._learner = learner
        self.losses: dict[str, float] = {}
        """Round and client -> mean loss, of this process's clients."""

    def postprocess_one_user(
        self, *, stats: TrainingStatistics, user_context: UserContext
    ) -> tuple[TrainingStatistics, Metrics]:
        """See pfl."""
        self.losses[user_context.user_id] = float(np.mean(self._learner.losses))
        self._learner.losses = []
        return stats, Metrics()

    def postprocess_server(
        self, *, stats: TrainingStatistics, central_context: Any, aggregate_metrics: Metrics
    ) -> tuple[TrainingStatistics, Metrics]:
        """See pfl."""
        return stats, Metrics()


class Clock(TrainingProcessCallback):
    """When the first round began, and when each round ended."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """See pfl."""
        self.stamps.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """See pfl."""
        self.stamps.append(time.perf_counter())
        return False, Metrics()


def simulate(job: Job) -> None:
    """All rounds, then the files."""
    seats = iter([f"{t} {c}" for t, cohort in enumerate(job.cohorts, 1) for c in cohort])

    def dataset(user_id: str) -> PyTorchTensorDataset:
        round, client = user_id.split(" ", 1)
        rows, prior_I = job.read(client, int(round))
        kwargs = {"prior_I": prior_I}
        return PyTorchTensorDataset(rows, user_id, train_kwargs=kwargs, eval_kwargs=kwargs)

    model = PyTorchModel(
        job.learner, job.optimizer, torch.optim.SGD(job.learner.parameters(), lr=1.0)
    )
    users = FederatedDataset(dataset, lambda: next(seats))
    noted, clock = Noted(job.learner), Clock()
    rounds = len(job.cohorts)
    FederatedAveraging().run(
        backend=SimulatedBackend(users, users, [noted, WeightByUser()]),
        model=model,
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds,
            train_cohort_size=len(job.cohorts[0]),
            val_cohort_size=None,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=job.facts["learning_rate"],
            local_batch_size=job.facts["batch_size"],
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    (job.folder / f"pfl-{rank}.json").write_text(json.dumps(noted.losses), "utf-8")
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        losses: list[dict[str, float]] = [{} for _ in job.cohorts]
        for part in range(world):
            for key, loss in json.loads((job.folder / f"pfl-{part}.json").read_text()).items():
                round, client = key.split(" ", 1)
                losses[int(round) - 1][client] = loss
        save_file({"theta_P": job.learner.theta_P.detach().numpy()}, job.folder / "pfl.safetensors")
        found = {"losses": losses, "stamps": clock.stamps}
        (job.folder / "pfl.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    simulate(open_job(sys.argv[1]))
