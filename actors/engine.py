"""DeepSpeed under the trunk. The only file that imports it.

Personal adapters enter the forward pass as tensors and stay outside DeepSpeed's optimizer: inside
it, an absent client's adapter drifts. What DeepSpeed's optimizer trains is the one adapter shared
by all clients, once per round.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import HashStore  # public, but not exported for checkers

from fellray.platform.config import RunConfig
from fellray.platform.packed import Batch, Saved
from fellray.platform.trunk import Trunk, adam_state, load_adam_state


class DeepSpeedEngine:
    """ZeRO stage 1 at world size 1; equal to `TorchEngine` bit for bit."""

    def __init__(self, module: Trunk, config: RunConfig):
        self.module = module
        deepspeed = _start_deepspeed(module.shared_P.device)
        train, server = config.train, config.server
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[module.shared_P],
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                # the default clips at 1.0: one client's gradient would scale everybody's
                "gradient_clipping": 0.0,
                # many backwards, then one step: the round's
                "managed_gradient_accumulation": False,
                "zero_optimization": {"stage": server.zero_stage},
                "optimizer": {
                    "type": "AdamW",
                    "params": {
                        "lr": server.shared_learning_rate,
                        "betas": [train.beta1, train.beta2],
                        "eps": train.eps,
                        "weight_decay": train.weight_decay,
                        "torch_adam": True,
                        "foreach": False,
                        "fused": False,
                    },
                },
            },
        )
        zero = self._engine.optimizer
        self._optimizer: torch.optim.Optimizer = zero.optimizer
        self._master: Tensor = zero.single_partition_of_fp32_groups[0]

    def backward(self, g_Md: Tensor, saved: Sequence[Saved], batch: Batch) -> Tensor:
        """See `platform.trunk.Engine`; a surrogate scalar carries the clients' gradient.

        ZeRO fails where no parameter of its own is in the graph, so the shared adapter takes part
        with a gradient of zero. Forward and backward are strictly in turn, however many passes are
        kept: DeepSpeed meets a pass only when its gradient is there.
        """
        h_Md = saved[0].x_Md.detach().requires_grad_()
        y_Md = self._engine(h_Md, batch, saved)
        self._engine.backward((y_Md * g_Md).sum() + 0.0 * self.module.shared_P.sum())
        assert h_Md.grad is not None
        return h_Md.grad

    def step_shared(self, gradient_P: Tensor) -> None:
        """See `platform.trunk.Engine`."""
        self._engine.backward((self.module.shared_P * gradient_P).sum())
        self._engine.step()

    def shared_state(self) -> dict[str, Tensor]:
        """See `platform.trunk.Engine`."""
        size = self.module.shared_P.numel()  # ZeRO's flat buffer may be longer: alignment
        state = adam_state(self._optimizer, self._master)
        return {name: t[:size] if t.dim() else t for name, t in state.items()}

    def load_shared(self, state: Mapping[str, Tensor]) -> None:
        """See `platform.trunk.Engine`."""
        with torch.no_grad():
            self.module.shared_P.copy_(state["values"])
        padded = {
            name: torch.nn.functional.pad(t, (0, self._master.numel() - t.numel()))
            if t.dim()
            else t
            for name, t in state.items()
        }
        load_adam_state(self._optimizer, self._master, padded)


def _start_deepspeed(device: torch.device) -> Any:
    """DeepSpeed in a world of one that opens no port: its store lives in this process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    # left to itself it takes a GPU where it sees one, also where the trunk is on the CPU
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A world of one has nobody to talk to: do not compile an op for talking (a minute or more).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
