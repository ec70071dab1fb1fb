"""Texts that grow token by token through the cut, with caches on both sides.

The client's caches are here; the trunk's may be gone at any call, and then the trunk is given all
tokens once more. What is to be written next is decided elsewhere (`search`).

Shapes: N rows, L tokens of all rows, d width.
"""

import uuid
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fellray.platform.caches import Cache, Stretches
from fellray.platform.messages import Activation, Continuation
from fellray.platform.rows import Rows
from fellray.platform.span import Answer, Trip
from fellray.platform.tower import Tower
from fellray.platform.wire import Wire

Send = Callable[[Continuation], Answer]


class Writing:
    """A batch of texts; a row is one way in which one of them goes on."""

    def __init__(
        self,
        tower: Tower,
        header: Activation,
        slot_N: Tensor,
        send: Send,
        wire: Wire,
        multiple: int,
        plain: bool = False,
    ):
        """Args: header: whose the first rows are; its tensors do not count. slot_N: their
        adapters. multiple: the padding rule's. plain: the tower has no adapters, and the trunk is
        to use none."""
        self._tower = tower
        self._header = header
        self._slot_N = slot_N
        self._send = send
        self._wire = wire
        self._multiple = multiple
        self._plain = plain
        self._text = uuid.uuid4().hex
        self._owner_N = header.row_client_N
        self._cache = Cache(len(slot_N))
        self._ids: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(slot_N)

    def extend(
        self, ids_L: Tensor, lengths_N: Tensor, parent_N: Tensor | None, goes_on: bool = True
    ) -> Trip[Tensor]:
        """The last hidden state of each row [N, d], as the head takes it.

        Args:
            ids_L: new tokens, at least one of each row, on the CPU.
            lengths_N: how many each row has, int64 on the CPU.
            parent_N: the rows of the last call that these go on from; None: they begin.
            goes_on: False where this is the last call.
        """
        if parent_N is not None:
            self._follow(parent_N)
        device = self._slot_N.device
        rows = Stretches(self._cache.lengths_N, lengths_N, self._multiple, device)
        parts = ids_L.split(lengths_N.tolist())
        self._ids = [torch.cat(row) for row in zip(self._ids, parts, strict=True)]
        h_Ld, used = self._tower.rise_on(rows, ids_L.to(device), self._slot_N, self._cache)
        y = yield self._send(self._pack(h_Ld, lengths_N, parent_N, rows.held_N, goes_on))
        if len(y):
            y_Ld = self._wire.read_output(y).to(h_Ld.device)
        else:  # the trunk holds nothing of it any more
            y_Ld = yield from self._send_all(lengths_N, goes_on)
        self._cache.lengths_N = self._cache.lengths_N + lengths_N
        states_Ld = self._tower.read_on(rows, y_Ld, used, self._cache)
        return states_Ld[(lengths_N.cumsum(0) - 1).to(states_Ld.device)]

    def _follow(self, parent_N: Tensor) -> None:
        self._cache.follow(parent_N)
        self._slot_N = self._slot_N[parent_N.to(self._slot_N.device)]
        self._owner_N = self._owner_N[parent_N.numpy()]
        self._ids = [self._ids[row] for row in parent_N.tolist()]

    def _send_all(self, lengths_N: Tensor, goes_on: bool) -> Trip[Tensor]:
        """The new tokens' hidden states at the upper cut [L, d], all tokens being sent."""
        all_N = torch.tensor([len(ids) for ids in self._ids])
        ids_L = torch.cat(self._ids).to(self._slot_N.device)
        rows = Rows(all_N, self._multiple, ids_L.device)
        h_Ld, _ = self._tower.rise(rows, ids_L, self._slot_N, False)
        y = yield self._send(self._pack(h_Ld, all_N, None, torch.zeros_like(all_N), goes_on))
        assert len(y), "what begins can always be answered"
        y_Ld = self._wire.read_output(y).to(h_Ld.device)
        few = zip(y_Ld.split(all_N.tolist()), lengths_N.tolist(), strict=True)
        return torch.cat([row[-new:] for row, new in few])

    def _pack(
        self,
        h_Ld: Tensor,
        lengths_N: Tensor,
        parent_N: Tensor | None,
        held_N: Tensor,
        goes_on: bool,
    ) -> Continuation:
        header = replace(
            self._header,
            row_client_N=self._owner_N,
            lengths_N=lengths_N.numpy().astype(np.int32),
        )
        activation = self._wire.send_activation(header, h_Ld, again=False)
        begins = np.full(len(lengths_N), -1, np.int32)
        parent = begins if parent_N is None else parent_N.numpy().astype(np.int32)
        held = held_N.numpy().astype(np.int32)
        return Continuation(activation, self._text, parent, held, self._plain, goes_on)
