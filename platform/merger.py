"""Messages of many clients merged into one batch of the trunk, each row with its own adapters.

It must not know what a message is for, nor whether its sender may ask.

Shapes: N rows, L real tokens, K lanes, M tokens in lanes, d width, P parameters.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fellray.platform.adapters import Site
from fellray.platform.config import RunConfig
from fellray.platform.gradient_sum import GradientSum
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.messages import Activation, Lease
from fellray.platform.packed import Batch
from fellray.platform.shared_adapter import SharedAdapter
from fellray.platform.slots import Slots
from fellray.platform.trunk import Engine

Key = tuple[str, Lease | None, int]
"""Client, lease, step: under what a forward pass is kept."""


class Merger:
    """Of one host."""

    def __init__(
        self,
        config: RunConfig,
        sites: Sequence[Site],
        engine: Engine,
        slots: Slots,
        shared: SharedAdapter,
        device: torch.device | None,
    ):
        self._config, self._sites, self._engine = config, sites, engine
        self._slots, self._shared, self._device = slots, shared, device

    def lay(self, activations: Sequence[Activation]) -> tuple[Lanes, Tensor, list[Key]]:
        """Lanes, and whose each of them is: its slot, and under what its pass is kept."""
        lengths = np.concatenate([a.lengths_N for a in activations]).astype(np.int64)
        # together, so that none of them makes room for another
        held = sorted({c for a in activations if a.lease is None for c in a.clients})
        self._slots.hold(activations[0].round, held)
        owners = [a.row_client_N.astype(np.int64) for a in activations]
        used = [np.unique(owner, return_inverse=True) for owner in owners]
        starts = np.cumsum([0, *(len(clients) for clients, _ in used)])
        lane_N = np.concatenate([own + at for (_, own), at in zip(used, starts, strict=False)])
        keys = [
            (a.clients[client], a.lease, a.step)
            for a, (clients, _) in zip(activations, used, strict=True)
            for client in clients.tolist()
        ]
        slots_K = self.find([client for client, _, _ in keys])
        lanes = Lanes(
            torch.from_numpy(lengths),
            torch.from_numpy(lane_N),
            self._config.model.pad_multiple,
            self._slots.bank.ranks_S[slots_K].cpu(),
            self._device,
            self._slots.bank.cuts_S[slots_K].cpu(),
        )
        order = lanes.order_K.tolist()
        return lanes, slots_K[lanes.order_K.to(self._device)], [keys[lane] for lane in order]

    def load(self, lanes: Lanes, slots_K: Tensor, train: bool) -> Batch:
        """The lanes with every set of their adapters, and where the gradients go if `train`."""
        spec, stacks, bank = self._config.model.lora, lanes.stacks, self._slots.bank

        def load(ranks: Sequence[int], values_SP: Tensor, sums: GradientSum) -> Loras:
            gradient_SP = sums.total_SP if train else None
            return Loras(
                self._sites, stacks, ranks, spec.scaling_of, slots_K, values_SP, gradient_SP
            )

        sets = [load([stack.rank for stack in stacks], bank.values_SP, bank.gradient)]
        if self._shared.there:
            common_SP = self._engine.module.shared_P.detach().expand(len(bank.values_SP), -1)
            sets.append(load([spec.r] * len(stacks), common_SP, self._shared.gradient))
        return Batch(lanes, sets)

    def spread(self, lanes: Lanes, packed_Ld: Tensor) -> Tensor:
        """Packed tokens in lanes, where and as the trunk computes."""
        return lanes.spread(packed_Ld.to(self._device, self._engine.module.dtype))

    def find(self, clients: Sequence[str]) -> Tensor:
        """The clients' slots."""
        return self._slots.find(clients).to(self._device)
