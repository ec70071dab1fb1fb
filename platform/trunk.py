"""The trunk as a module, and who may run and train it.

It holds frozen blocks and one adapter shared by all clients; personal adapters come in with every
call. Nothing here knows clients, messages, Ray or DeepSpeed.

Shapes: M tokens of all lanes of a batch, d width, P parameters.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fellray.platform.adapters import Site, start
from fellray.platform.causal import CausalBlocks
from fellray.platform.config import RunConfig
from fellray.platform.encoder import Backbone
from fellray.platform.packed import Batch, PackedBlocks, Saved
from fellray.platform.split import Blocks, cut_model


class Trunk(nn.Module):
    """The frozen blocks, and one adapter shared by all clients [P]."""

    def __init__(self, blocks: Blocks, shared_P: Tensor, dtype: torch.dtype = torch.float32):
        """Args: dtype: in what the blocks compute; the adapter stays as it is."""
        super().__init__()
        self.blocks = blocks.to(dtype)
        self.dtype = dtype
        self.packed = pack(blocks)
        self.shared_P = nn.Parameter(shared_P.clone())

    def forward(self, h_Md: Tensor, batch: Batch, saved: Sequence[Saved]) -> Tensor:
        """A pass that was made before, for autograd: its gradient is right, its value is h."""
        y: Tensor = _Passed.apply(h_Md, self.packed, batch, saved)  # type: ignore[no-untyped-call]
        return y


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_Md: Tensor, packed: PackedBlocks, batch: Batch, saved: Sequence[Saved]
    ) -> Tensor:
        ctx.packed, ctx.batch, ctx.saved = packed, batch, saved
        return h_Md.view_as(h_Md)

    @staticmethod
    def backward(ctx: Any, g_Md: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.packed.backward(g_Md, ctx.saved, ctx.batch), None, None, None


class Engine(Protocol):
    """Who runs and trains a `Trunk`."""

    module: Trunk

    def backward(self, g_Md: Tensor, saved: Sequence[Saved], batch: Batch) -> Tensor:
        """The gradient at the lower cut [M, d], given a forward pass and the gradient at its end;
        the adapters' gradients go to the batch's rows."""
        ...

    def step_shared(self, gradient_P: Tensor) -> None:
        """One optimizer step of the shared adapter."""
        ...

    def shared_state(self) -> dict[str, Tensor]:
        """Copies of the shared adapter [P] and of its AdamW moments and step count."""
        ...

    def load_shared(self, state: Mapping[str, Tensor]) -> None:
        """Put the shared adapter to a `shared_state`; moments it does not hold start anew."""
        ...


class TorchEngine:
    """Plain torch: the twin that DeepSpeed must equal."""

    def __init__(self, module: Trunk, config: RunConfig):
        self.module = module
        self._optimizer = torch.optim.AdamW(
            [module.shared_P],
            lr=config.server.shared_learning_rate,
            betas=(config.train.beta1, config.train.beta2),
            eps=config.train.eps,
            weight_decay=config.train.weight_decay,
            foreach=False,
        )

    def backward(self, g_Md: Tensor, saved: Sequence[Saved], batch: Batch) -> Tensor:
        """See `Engine`."""
        return self.module.packed.backward(g_Md, saved, batch)

    def step_shared(self, gradient_P: Tensor) -> None:
        """See `Engine`."""
        self.module.shared_P.grad = gradient_P
        self._optimizer.step()
        self._optimizer.zero_grad()

    def shared_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return adam_state(self._optimizer, self.module.shared_P)

    def load_shared(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        load_adam_state(self._optimizer, self.module.shared_P, state)


def pack(blocks: Blocks) -> PackedBlocks:
    """Blocks on lanes, of either kind of model."""
    return CausalBlocks(blocks) if blocks.rotary else PackedBlocks(blocks)


def build_trunk(
    backbone: Backbone, config: RunConfig, device: torch.device
) -> tuple[Trunk, list[Site]]:
    """The blocks between the cuts in the precision that the config names, the shared adapter at its
    seeded start; and the projections that are adapted."""
    parts = cut_model(backbone, config.model)
    sites = parts.cut.sites["trunk"]
    # DeepSpeed needs a number to step, also where nothing is adapted and so nothing shared
    seeded = start(sites, config.model.lora, config.seed) if sites else torch.zeros(1)
    dtype: torch.dtype = getattr(torch, config.server.dtype)
    return Trunk(parts.trunk, seeded, dtype).to(device), sites


def mean_gradient(clients: Sequence[str], rows_CP: np.ndarray) -> np.ndarray:
    """The mean of the clients' gradients [P]: fp64 in the order of their ids, so that neither
    batches nor arrival nor the number of servers change it."""
    order = sorted(range(len(clients)), key=clients.__getitem__)
    ordered = torch.from_numpy(rows_CP[order]).double()
    return (ordered.sum(0).float() / len(order)).numpy()


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's values, moments and step count, as copies; zeros before the first step."""
    held = optimizer.state.get(parameter, {})
    zeros = torch.zeros_like(parameter.detach())
    return {
        "values": parameter.detach().clone(),
        "moment1": held.get("exp_avg", zeros).clone(),
        "moment2": held.get("exp_avg_sq", zeros).clone(),
        "steps": torch.as_tensor(held.get("step", 0.0)).clone(),
    }


def load_adam_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: Mapping[str, Tensor]
) -> None:
    """The inverse of `adam_state`; missing moments start anew."""
    with torch.no_grad():
        parameter.copy_(state["values"])
    optimizer.state.pop(parameter, None)
    if "steps" in state and state["steps"] > 0:
        optimizer.state[parameter] = {
            "step": state["steps"].clone(),
            "exp_avg": state["moment1"].to(parameter.device, copy=True),
            "exp_avg_sq": state["moment2"].to(parameter.device, copy=True),
        }
