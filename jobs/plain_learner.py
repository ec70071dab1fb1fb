"""A client's local training in plain torch: what a rival's client computes.

It runs in a rival's own environment, on the files that `rival_job.py` wrote. It must not know
fellray, nor any framework for federated learning: numpy, torch and safetensors, nothing else. The
encoder is whole, one sequence of blocks, and a batch is padded to its own longest row.

Shapes: N rows of a step (or of a round), T tokens of the longest, I items, d width, P parameters.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor, Tensor]
"""Token ids [N, T], padded with zeros; real tokens of each row [N]; target items [N]."""


class Learner(nn.Module):
    """A frozen BERT whose low-rank adapters are one flat parameter."""

    def __init__(self, job: dict[str, Any], frozen: dict[str, np.ndarray], start_P: np.ndarray):
        """Args: job: `job.json`. frozen: the encoder by Hugging Face's names, and the items."""
        super().__init__()
        self._job = job
        self._frozen = {name: torch.from_numpy(array) for name, array in frozen.items()}
        self._scaling = float(job["scaling"])
        self._sizes = [size * job["r"] for site in job["sites"] for size in site["shape"]]
        self.theta_P = nn.Parameter(torch.from_numpy(start_P.copy()))
        self.losses: list[float] = []
        """Of each row that was trained on since somebody emptied the list."""

    def loss(self, ids_NT: Tensor, lengths_N: Tensor, target_N: Tensor, prior_I: Tensor) -> Tensor:
        """Mean cross-entropy of a step, softmax over all items."""
        scores_NI = self.encode(ids_NT, lengths_N) @ self._frozen["items"].T
        loss = F.cross_entropy(scores_NI / self._job["temperature"] + prior_I, target_N)
        self.losses += [float(loss.detach())] * len(target_N)
        return loss

    def metrics(self, *_: Tensor, **__: Any) -> dict[str, Any]:
        """Nothing: what is measured is the loss of training. One framework asks for the method."""
        return {}

    def encode(self, ids_NT: Tensor, lengths_N: Tensor) -> Tensor:
        """Unit vectors [N, d]: the mean over real tokens."""
        ids_NT = ids_NT[:, : int(lengths_N.max())]
        mask_NT = torch.arange(ids_NT.shape[1]) < lengths_N[:, None]
        pairs = self._pairs()
        w = self._frozen
        h_NTd = (
            w["embeddings.word_embeddings.weight"][ids_NT]
            + w["embeddings.position_embeddings.weight"][: ids_NT.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        h_NTd = self._normalize(h_NTd, "embeddings.LayerNorm")
        for i in range(self._job["blocks"]):
            h_NTd = self._block(h_NTd, mask_NT[:, None, None, :], f"encoder.layer.{i}", pairs)
        weight = mask_NT[:, :, None].to(h_NTd.dtype)
        return F.normalize((h_NTd * weight).sum(1) / weight.sum(1), dim=1)

    def _block(
        self, h_NTd: Tensor, mask: Tensor, name: str, pairs: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        def linear(x: Tensor, leaf: str) -> Tensor:
            path = f"{name}.{leaf}"
            y = F.linear(x, self._frozen[f"{path}.weight"], self._frozen[f"{path}.bias"])
            if path in pairs:
                a, b = pairs[path]
                y = y + F.linear(F.linear(x, a), b) * self._scaling
            return y

        heads = (self._job["heads"], -1)
        q, k, v = (
            linear(h_NTd, f"attention.self.{leaf}").unflatten(2, heads).transpose(1, 2)
            for leaf in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = linear(mixed.transpose(1, 2).flatten(2), "attention.output.dense")
        h_NTd = self._normalize(h_NTd + mixed, f"{name}.attention.output.LayerNorm")
        wide = linear(F.gelu(linear(h_NTd, "intermediate.dense")), "output.dense")
        return self._normalize(h_NTd + wide, f"{name}.output.LayerNorm")

    def _normalize(self, x: Tensor, path: str) -> Tensor:
        weight, bias = self._frozen[f"{path}.weight"], self._frozen[f"{path}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self._job["eps"])

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Path -> A [r, d_in] and B [d_out, r]."""
        parts = iter(self.theta_P.split(self._sizes))
        r = self._job["r"]
        return {
            site["path"]: (next(parts).view(r, -1), next(parts).view(-1, r))
            for site in self._job["sites"]
        }


class Job:
    """The folder of a job, opened for training."""

    def __init__(self, folder: str):
        """Torch uses the threads that the job names."""
        self.folder = Path(folder)
        self.facts: dict[str, Any] = json.loads((self.folder / "job.json").read_text("utf-8"))
        self.cohorts: list[list[str]] = self.facts["cohorts"]
        """Who trains in rounds 1, 2, ..."""
        torch.set_num_threads(self.facts["threads"])
        self.start_P: np.ndarray = load_file(self.folder / "start.safetensors")["theta_P"]
        self.learner = Learner(
            self.facts, load_file(self.folder / "frozen.safetensors"), self.start_P
        )

    def read(self, client: str, round: int) -> tuple[Rows, Tensor]:
        """A client's rows of a round in the order in which they are read, and its prior [I]."""
        held = load_file(self.folder / "clients" / f"{client}.safetensors")
        lengths_N = held[f"{round}.lengths_N"]
        mask_NT = np.arange(lengths_N.max()) < lengths_N[:, None]
        ids_NT = np.zeros(mask_NT.shape, np.int64)
        ids_NT[mask_NT] = held[f"{round}.ids_L"]
        arrays = (ids_NT, lengths_N, held[f"{round}.target_N"], held["prior_I"])
        ids, lengths, target, prior = map(torch.from_numpy, arrays)
        return (ids, lengths, target), prior

    def optimizer(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        """The client's AdamW; its moments begin with the round."""
        settings = self.facts["adamw"]
        return torch.optim.AdamW(
            parameters, lr=lr, **(settings | {"betas": tuple(settings["betas"])})
        )

    def train(self, theta_P: np.ndarray, client: str, round: int) -> tuple[np.ndarray, float]:
        """A client's round from theta; its adapters after it, and its mean loss over rows."""
        learner = self.learner
        learner.theta_P.data = torch.from_numpy(theta_P.copy())
        learner.losses = []
        optimizer = self.optimizer(learner.parameters(), self.facts["learning_rate"])
        rows, prior_I = self.read(client, round)
        columns = (column.split(self.facts["batch_size"]) for column in rows)
        for ids_NT, lengths_N, target_N in zip(*columns, strict=True):
            optimizer.zero_grad()
            learner.loss(ids_NT, lengths_N, target_N, prior_I).backward()
            optimizer.step()
        return learner.theta_P.detach().numpy().copy(), float(np.mean(learner.losses))


@cache
def open_job(folder: str) -> Job:
    """One per process: a worker that trains many clients loads the encoder once."""
    return Job(folder)
