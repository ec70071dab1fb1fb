"""The trunk as a module, and who may run and train it.

It holds frozen blocks and one adapter shared by all clients; personal adapters come in with every
call. Nothing here knows clients, messages, Ray or DeepSpeed.

Shapes: n rows of one padded length T, d width, P parameters.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fellray.platform.config import RunConfig
from fellray.platform.split import Blocks


class Trunk(nn.Module):
    """The frozen blocks, and one adapter shared by all clients [P]."""

    def __init__(self, blocks: Blocks, shared_P: Tensor):
        super().__init__()
        self.blocks = blocks
        self.shared_P = nn.Parameter(shared_P.clone())

    def forward(self, h_nTd: Tensor, mask_nT: Tensor, *flat: Tensor) -> Tensor:
        """Hidden states [n, T, d]; `flat` is sets of A, B, A, B, ... in the order of the sites."""
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        per_set = len(self.blocks.adapted)
        sets = [pairs[i : i + per_set] for i in range(0, len(pairs), per_set)] if per_set else []
        y: Tensor = self.blocks(h_nTd, mask_nT, sets)
        return y


class Engine(Protocol):
    """Who runs and trains a `Trunk`."""

    module: Trunk

    def forward(self, h_nTd: Tensor, mask_nT: Tensor, *flat: Tensor) -> Tensor:
        """The trunk's forward pass."""
        ...

    def backward(self, y_nTd: Tensor, g_nTd: Tensor) -> None:
        """Gradients of every leaf of y's graph, given the gradient at y."""
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

    def forward(self, h_nTd: Tensor, mask_nT: Tensor, *flat: Tensor) -> Tensor:
        """See `Engine`."""
        y: Tensor = self.module(h_nTd, mask_nT, *flat)
        return y

    def backward(self, y_nTd: Tensor, g_nTd: Tensor) -> None:
        """See `Engine`."""
        y_nTd.backward(g_nTd)

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
