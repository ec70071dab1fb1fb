"""A round in the order of FELLRec's released code: what our round is measured against.

One process takes the clients one after the other. For each it loads the whole model from disk,
puts that client's adapters in, trains on the client's histories and takes the adapters out; at the
end it mixes them in place. Model and adapters are Hugging Face's and peft's own, rows are padded to
the longest of their batch. Adapters are kept in memory, where the released code writes them to disk
and reads them again. Samples, seeds, loss and optimizer settings are those of our run.

Shapes: N rows of a step, T tokens of the longest, C clients, P parameters of one client.
"""

import time

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModel

from fellray.actors.world import World
from fellray.platform.adapters import start
from fellray.platform.aggregation import describe, reduce
from fellray.platform.config import RunConfig
from fellray.platform.encoder import locate
from fellray.platform.fellrec import Fellrec
from fellray.platform.reader import Batch, Reader
from fellray.platform.retrieval import Scorer, mean_losses
from fellray.platform.shards import Dataset
from fellray.platform.split import PARTS, plan_cut


class Released:
    """All clients of a run, in one process."""

    def __init__(self, config: RunConfig, world: World, threads: int):
        self._config = config
        self._threads = threads
        self._where = locate(config.model.name)
        self._pad = world.catalogue.tokens.pad
        self._learners = sorted(world.seats)
        data = Dataset(config.data.path)
        shards = {learner: data.shard(learner) for learner in self._learners}
        tokens, vectors_Id = world.catalogue.tokens, world.catalogue.vectors_Id
        model = config.model
        self._readers = {c: Reader(config, tokens, {c: [s]}) for c, s in shards.items()}
        self._scorers = {
            c: Scorer(vectors_Id, [s], model.temperature, model.prior) for c, s in shards.items()
        }
        cut = plan_cut(world.backbone, model)
        sites = [site for part in PARTS for site in cut.sites[part]]
        self._theta_CP = start(sites, model.lora, config.seed).repeat(len(shards), 1)
        self.loading = 0.0
        """Seconds spent on loading the model, so far."""

    def train_round(self, round: int) -> list[float]:
        """Each client's mean loss of the round."""
        torch.set_num_threads(self._threads)
        losses = [self._train(c, learner, round) for c, learner in enumerate(self._learners)]
        samples = [self._config.train.local_samples] * len(losses)
        method = Fellrec(as_published=True)
        theta_CP = self._theta_CP
        meta = describe(
            round, self._learners, losses, samples, theta_CP, theta_CP, method.compares()
        )
        self._theta_CP = reduce(method.plan(meta), theta_CP)
        return losses

    def _train(self, c: int, learner: str, round: int) -> float:
        began = time.perf_counter()
        model = self._load()
        self.loading += time.perf_counter() - began
        trained = [p for p in model.parameters() if p.requires_grad]
        vector_to_parameters(self._theta_CP[c], trained)
        train = self._config.train
        optimizer = torch.optim.AdamW(
            trained,
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.eps,
            weight_decay=train.weight_decay,
        )
        losses = []
        for batch, target_N in self._readers[learner].steps(round):
            scores_NI = self._scorers[learner].score(self._encode(model, batch), batch.shard_N)
            loss = mean_losses(scores_NI, target_N, batch.slot_N, 1).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses += [float(loss.detach())] * len(target_N)
        self._theta_CP[c] = parameters_to_vector(trained).detach()
        return sum(losses) / len(losses)

    def _load(self) -> nn.Module:
        lora = self._config.model.lora
        base = AutoModel.from_pretrained(self._where, add_pooling_layer=False, dtype=torch.float32)
        adapters = LoraConfig(
            r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules)
        )
        model: nn.Module = get_peft_model(base, adapters).eval()  # dropout is 0 in our run too
        return model

    def _encode(self, model: nn.Module, batch: Batch) -> Tensor:
        """Unit vectors [N, d]: the mean over real tokens."""
        lengths_N = batch.rows.lengths_N
        mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
        ids_NT = torch.full(mask_NT.shape, self._pad)
        ids_NT[mask_NT] = batch.ids_L
        h_NTd = model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
        weight = mask_NT[:, :, None].to(h_NTd.dtype)
        return F.normalize((h_NTd * weight).sum(1) / weight.sum(1), dim=1)
