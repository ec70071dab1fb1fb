"""What crosses the cut in which form: coded hidden states, one vector for a history, nothing.

Client and server have one of these each, made from the same config: what one side sends the other
reads. Noise is counter-based: (seed, way, client, round, step) and a number's place among its
client's decide it, so neither batches nor actors do. It must not know who carries messages.

Shapes: N rows, L real tokens of all rows together, d width, B bytes of a name.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fellray.platform.codec import Codec
from fellray.platform.config import RunConfig
from fellray.platform.messages import Activation, Gradient
from fellray.platform.rows import Rows
from fellray.platform.split import mean_tokens

Way = Literal["up", "down"]

NAME = 16
"""Bytes of a row's name."""


class Wire:
    """The forms of one run's crossings."""

    def __init__(self, config: RunConfig, dim: int, names: bool = True):
        """Args: dim: the encoder's width. names: False: the server is to hold no rows, whatever the
        config says."""
        rule = config.wire
        self._seed = config.seed
        self._multiple = config.model.pad_multiple
        self._states = Codec(rule.activation, dim)
        self._gradients = Codec(rule.gradient, dim)
        self._means = Codec("float32" if self._states.exact else "int8", dim)
        self._mean_gradients = Codec("float32" if self._gradients.exact else "int8", dim)
        self._dim = dim
        self.pooled = rule.pooled
        """One vector for a history crosses the upper cut."""
        self.frozen = config.model.freeze_bottom
        """No gradient crosses the lower cut, and a history's hidden states there stay the same."""
        self._names = names and rule.keep_rows_mib > 0

    def send_activation(self, header: Activation, h_Ld: Tensor, again: bool = True) -> Activation:
        """The message with hidden states at the lower cut, and with names where rows are kept.

        Args:
            again: the same rows may be sent once more.
        """
        activation = replace(header, h_Ld=self._states.encode(h_Ld.detach()))
        # what nobody will ask for again needs no name
        named = self._names and again and (header.lease or self.frozen)
        return name_rows(activation) if named else activation

    def read_activations(self, activations: Sequence[Activation]) -> Tensor:
        """Hidden states at the lower cut [L, d] of several messages."""
        return self._states.decode(_join([activation.h_Ld for activation in activations]))

    def send_outputs(self, y_Ld: Tensor, activations: Sequence[Activation]) -> list[np.ndarray]:
        """Each message's answer: hidden states at the upper cut, or their means."""
        if self.pooled:
            means = self._means.encode(self._pool(y_Ld.float(), _lengths(activations)))
            return _part(means, [len(a.lengths_N) for a in activations])
        return _part(self._states.encode(y_Ld), [a.num_tokens for a in activations])

    def read_output(self, output: np.ndarray) -> Tensor:
        """Hidden states at the upper cut [L, d], or their means [N, d]."""
        return (self._means if self.pooled else self._states).decode(output)

    def send_gradient(self, g: Tensor, activation: Activation) -> np.ndarray:
        """The gradient of what `read_output` gave, as it goes up."""
        return self._upper.encode(g.contiguous(), self._noise([activation], "up", self.pooled))

    def read_gradients(self, sent: Sequence[tuple[Activation, Gradient]]) -> Tensor:
        """Gradients at the upper cut [L, d] of several messages."""
        g = self._upper.decode(_join([gradient.g_Ld for _, gradient in sent]))
        if not self.pooled:
            return g
        lengths_N = _lengths([activation for activation, _ in sent])
        return (g / lengths_N[:, None].to(g.dtype)).repeat_interleave(lengths_N, 0)

    def send_inputs(self, down_Ld: Tensor, activations: Sequence[Activation]) -> list[np.ndarray]:
        """Each message's gradient at the lower cut; nothing where no bottom is trained."""
        if self.frozen:
            return [np.empty((0, self._dim), np.float32) for _ in activations]
        coded = self._gradients.encode(down_Ld, self._noise(activations, "down", False))
        return _part(coded, [a.num_tokens for a in activations])

    def read_input(self, down: np.ndarray) -> Tensor | None:
        """The gradient at the lower cut [L, d]; None where no bottom is trained."""
        return None if self.frozen else self._gradients.decode(down)

    def fits(self, activation: Activation) -> bool:
        """Whether its hidden states are of this run's form."""
        return self._states.fits(activation.h_Ld)

    def answers(self, activation: Activation, gradient: Gradient) -> bool:
        """Whether a gradient is of this run's form, and of the activation's rows."""
        size = len(activation.lengths_N) if self.pooled else activation.num_tokens
        return self._upper.fits(gradient.g_Ld) and len(gradient.g_Ld) == size

    @property
    def _upper(self) -> Codec:
        """Of gradients at the upper cut."""
        return self._mean_gradients if self.pooled else self._gradients

    def _pool(self, y_Ld: Tensor, lengths_N: Tensor) -> Tensor:
        """Rows' means [N, d], with the bits that a client's own top would find."""
        rows = Rows(lengths_N, self._multiple, y_Ld.device)
        means = [mean_tokens(rows.pad(y_Ld, group), group.mask_nT) for group in rows.groups]
        order = torch.cat([group.rows_n for group in rows.groups])
        return torch.cat(means)[order.argsort()]

    def _noise(
        self, activations: Sequence[Activation], way: Way, pooled: bool
    ) -> np.ndarray | None:
        """uint16 [L, d], or [N, d]."""
        if self._gradients.exact:
            return None
        return np.concatenate([self._draw(activation, way, pooled) for activation in activations])

    def _draw(self, activation: Activation, way: Way, pooled: bool) -> np.ndarray:
        owner_N = activation.row_client_N
        owner_L = owner_N if pooled else np.repeat(owner_N, activation.lengths_N)
        noise_Ld = np.empty((len(owner_L), self._dim), np.uint16)
        for place in np.unique(owner_L).tolist():
            mine = owner_L == place
            words = [self._seed, way, activation.clients[place], activation.round, activation.step]
            key = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
            count = int(mine.sum()) * self._dim
            drawn = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-count // 4))
            noise_Ld[mine] = drawn.astype("<u8").view("<u2")[:count].reshape(-1, self._dim)
        return noise_Ld


def name_rows(activation: Activation) -> Activation:
    """The message with a digest of each row's bytes, which all are in it."""
    ends = np.cumsum(activation.lengths_N)
    rows = np.split(np.ascontiguousarray(activation.h_Ld), ends[:-1])
    names = b"".join(hashlib.sha256(row.data).digest()[:NAME] for row in rows)
    return replace(
        activation,
        names_NB=np.frombuffer(names, np.uint8).reshape(len(rows), NAME),
        sent_N=np.ones(len(rows), np.bool_),
    )


def _lengths(activations: Sequence[Activation]) -> Tensor:
    return torch.from_numpy(_join([a.lengths_N for a in activations]).astype(np.int64))


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array of several messages' rows; a single message is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _part(joined: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Each message's own rows, as views."""
    return np.split(joined, np.cumsum(sizes[:-1]))
