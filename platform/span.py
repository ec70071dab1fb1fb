"""Blocks that live somewhere else, used as an ordinary module: autograd crosses the cut by itself.

`Remote` has three peers that are equals: the trunk in this process, the trunk behind Ray, and a
test's double. Nothing here knows which one it is.

Shapes: L real tokens of all rows together, d width.
"""

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from fellray.platform.ledger import Ledger
from fellray.platform.messages import Activation, Gradient, Lease


class Remote(Protocol):
    """The far side of the cut."""

    def begin(self, run: str, round: int, clients: tuple[str, ...]) -> Lease:
        """Put the clients' trunk adapters to the round's start and permit its steps."""
        ...

    def forward(self, activation: Activation) -> np.ndarray:
        """Run the trunk; hidden states at the upper cut [L, d]."""
        ...

    def backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """Backpropagate, step the rows' trunk adapters, and give the gradient at the lower cut.

        The activation comes again: the trunk may not have kept the forward pass (recompute).
        """
        ...


class RemoteSpan(nn.Module):
    """The trunk as a module of the client's model; what crosses is entered in a ledger."""

    def __init__(self, remote: Remote, ledger: Ledger):
        super().__init__()
        self.remote = remote
        self.ledger = ledger

    def forward(self, h_Ld: Tensor, header: Activation) -> Tensor:
        """Packed hidden states at the upper cut [L, d]; the header is the message without them."""
        y: Tensor = _Cross.apply(h_Ld, header, self)  # type: ignore[no-untyped-call]
        return y

    def send_forward(self, activation: Activation) -> np.ndarray:
        """One crossing up and one down."""
        kind = "" if activation.lease else "evaluation_"
        output = self.remote.forward(activation)
        self.ledger.enter_rows(activation, kind + "activation", activation.h_Ld)
        self.ledger.enter_rows(activation, kind + "output", output)
        self.ledger.enter_envelope(activation)
        return output

    def send_backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """One crossing up, the activation again, and one down."""
        down = self.remote.backward(activation, gradient)
        self.ledger.enter_rows(activation, "gradient", gradient.g_Ld)
        self.ledger.enter_rows(activation, "activation_repeat", activation.h_Ld)
        self.ledger.enter_rows(activation, "input_gradient", down)
        self.ledger.enter_envelope(activation)
        return down


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_Ld: Tensor, header: Activation, span: RemoteSpan) -> Tensor:
        ctx.span = span
        ctx.activation = replace(header, h_Ld=h_Ld.detach().cpu().numpy())
        return from_dlpack(span.send_forward(ctx.activation)).to(h_Ld.device)

    @staticmethod
    def backward(ctx: Any, g_Ld: Tensor) -> tuple[Tensor, None, None]:
        sent: Activation = ctx.activation
        gradient = Gradient(sent.run, sent.round, sent.step, g_Ld.contiguous().cpu().numpy())
        down = from_dlpack(ctx.span.send_backward(sent, gradient))
        return down.to(g_Ld.device), None, None
