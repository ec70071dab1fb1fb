"""Texts in writing: tokens that follow others through the trunk, with a cache of what came before.

It must not know whose texts they are, nor whether their sender may ask.

Shapes: N rows, L new tokens, K lanes, M tokens in lanes, d width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fellray.platform.caches import Cache, Caches, Stretches
from fellray.platform.causal import CausalBlocks, Look
from fellray.platform.config import RunConfig
from fellray.platform.merger import Merger
from fellray.platform.messages import Continuation
from fellray.platform.packed import Batch
from fellray.platform.trunk import Engine
from fellray.platform.wire import Wire


class Texts:
    """Those that one host is writing."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        merger: Merger,
        wire: Wire,
        device: torch.device | None,
    ):
        self.caches = Caches(config.server.cache_mib * 2**20)
        self._multiple = config.model.pad_multiple
        self._engine, self._merger, self._wire, self._device = engine, merger, wire, device

    @property
    def possible(self) -> bool:
        """Whether the trunk is a decoder's."""
        return isinstance(self._engine.module.packed, CausalBlocks)

    def extend(self, continuations: Sequence[Continuation]) -> list[np.ndarray]:
        """Hidden states at the upper cut [L, d] of each message; no token where what came before is
        not in the cache."""
        caches = [self._resume(continuation) for continuation in continuations]
        ready = [(c, cache) for c, cache in zip(continuations, caches, strict=True) if cache]
        found = iter(self._write(ready) if ready else ())
        return [
            next(found) if cache else c.activation.h_Ld[:0]
            for c, cache in zip(continuations, caches, strict=True)
        ]

    def _resume(self, continuation: Continuation) -> Cache | None:
        """What is held of a message's rows; None where that is not what was sent before."""
        parent_N = torch.from_numpy(continuation.parent_N.astype(np.int64))
        if bool((parent_N < 0).all()):
            return Cache(len(parent_N))
        cache = self.caches.take(continuation.text)
        if cache is None or int(parent_N.max()) >= len(cache.lengths_N):
            return None
        cache.follow(parent_N)
        same = np.array_equal(cache.lengths_N.numpy(), continuation.held_N)
        return cache if same else None

    def _write(self, ready: Sequence[tuple[Continuation, Cache]]) -> list[np.ndarray]:
        activations = [continuation.activation for continuation, _ in ready]
        lanes, slots_K, _ = self._merger.lay(activations)
        plain = ready[0][0].plain
        batch = Batch(lanes, []) if plain else self._merger.load(lanes, slots_K, train=False)
        looks = []
        for continuation, cache in ready:
            lengths_N = torch.from_numpy(continuation.activation.lengths_N.astype(np.int64))
            rows = Stretches(cache.lengths_N, lengths_N, self._multiple, self._device)
            cache.lengths_N = cache.lengths_N + lengths_N
            looks.append(Look(rows, cache))
        h_Md = self._merger.spread(lanes, self._wire.read_activations(activations))
        packed = self._engine.module.packed
        assert isinstance(packed, CausalBlocks)
        y_Md = packed.extend(h_Md, batch, looks)
        for continuation, cache in ready:
            if continuation.goes_on:
                self.caches.put(continuation.text, cache)
        return self._wire.send_outputs(lanes.collect(y_Md), activations)
