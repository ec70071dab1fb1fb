"""The trunk's host: frozen blocks, every client's personal adapters, batches of whoever waits.

It sees activations and gradients, never tokens or labels. Backward is given the inputs again: what
forward could not keep is computed once more, so a lost client or a lost server loses no more than a
step. Bits do not depend on who shares a batch: a client's rows of one step travel together, are
padded by a rule on them alone and summed in their order. It knows nothing of Ray or DeepSpeed.

Shapes: N rows, L real tokens, K lanes, M tokens in lanes, d width, C clients, P parameters.
"""

from collections.abc import Callable, Collection, Container, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from fellray.platform.adapters import Site, start
from fellray.platform.admission import Admission, follows
from fellray.platform.bank import Bank
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.keep import Keep
from fellray.platform.manifest import Staged
from fellray.platform.merger import Merger
from fellray.platform.messages import (
    Activation,
    Continuation,
    Gradient,
    Installation,
    Lease,
    StaleLease,
    Unheld,
)
from fellray.platform.own import ALIKE, Own
from fellray.platform.recall import Recall
from fellray.platform.residual import Residual
from fellray.platform.rounds import Rounds
from fellray.platform.shared_adapter import SharedAdapter
from fellray.platform.slots import WRITTEN, Slots
from fellray.platform.texts import Texts
from fellray.platform.trunk import Engine
from fellray.platform.wire import Wire

Item = TypeVar("Item")


class TrunkHost:
    """Trains and serves the trunk for many clients. One thread at a time may call it."""

    def __init__(
        self,
        config: RunConfig,
        learners: Container[str],
        sites: Sequence[Site],
        engine: Engine,
        rounds: Rounds,
        device: torch.device | None = None,
        index: int = 0,
        own: Own = ALIKE,
        kept: int | None = None,
        trains: bool = True,
    ):
        """Args: learners: ids of everyone who may ask. index: names this host's files. kept: see
        `Slots`. trains: False: only forward passes are asked for."""
        self._holder = f"trunk-{index:05d}"
        self._seeded_P = start(sites, config.model.lora, config.seed)
        self._rounds = rounds
        self._engine = engine
        lora, rule = config.model.lora, config.method.local()
        self._rule = rule
        self._slots = Slots(
            lambda slots: Bank(sites, lora, config.train if trains else None, slots, device, rule),
            "trunk",
            config.train.moments == "keep",
            rounds,
            own,
            kept,
        )
        self._shared = SharedAdapter(config, sites, engine, rounds, device)
        self._residual = Residual(config, sites, engine.module.blocks.adapted, rounds)
        self._keep = Keep(config.server.keep_graphs_mib * 2**20)
        self._recall = Recall(config.wire.keep_rows_mib * 2**20)
        self._wire = Wire(config, engine.module.packed.dim)
        self._admission = Admission(config.name, learners, self._wire)
        self._merger = Merger(config, sites, engine, self._slots, self._shared, device)
        self._texts = Texts(config, engine, self._merger, self._wire, device)
        self._installed = -1
        self._staged: tuple[Staged, ...] = ()

    def begin(self, run: str, round: int, clients: Sequence[str], twin: bool = False) -> Lease:
        """Roll the clients back to the start of `round` and let them train it.

        Whatever an earlier try of this round left behind, a dead actor's half round say, is gone,
        and what still arrives from it is refused.

        Args:
            twin: it is their anchors that train; where the method's rule has them train, they do so
                first.

        Raises:
            StaleLease: the anchors were trained in another life of this server.
        """
        self._texts.caches.clear()
        if self._rule.twin and not twin and not self._slots.have_twins(clients):
            raise StaleLease("the server was restarted during the round")
        self._shared.bring(round - 1)
        self._residual.bring(round - 1)
        slots = self._slots.hold(round - 1, clients)
        self._slots.train(clients, twin)
        self._shared.begin(clients, slots, len(self._slots.bank.values_SP))
        return self._admission.begin(round, clients)

    def forward(self, activations: Sequence[Activation]) -> list[np.ndarray | Exception]:
        """Hidden states at the upper cut [L, d] for each message; a refusal stays its own."""
        answers: list[np.ndarray | Exception] = []
        for _, of_one_round in groupby(activations, key=lambda activation: activation.round):
            answers += self._each(list(of_one_round), self._check, self._forward)
        return answers

    def backward(self, sent: Sequence[tuple[Activation, Gradient]]) -> list[np.ndarray | Exception]:
        """Gradients at the lower cut [L, d], after stepping the rows' personal adapters."""
        return self._each(sent, self._check_step, self._backward)

    def extend(self, continuations: Sequence[Continuation]) -> list[np.ndarray | Exception]:
        """Hidden states at the upper cut [L, d] of tokens that follow others, for each message; no
        token where what came before is not in the cache."""
        answers: list[np.ndarray | Exception] = []
        for _, alike in groupby(continuations, key=lambda c: (c.activation.round, c.plain)):
            answers += self._each(list(alike), self._check_continuation, self._texts.extend)
        return answers

    def report(
        self, lives: Collection[str], clients: Sequence[str], shared: bool
    ) -> tuple[list[bool], np.ndarray]:
        """Whose trained trunk adapter is finite, and the adapters [C, P]; no columns if not shared.

        Raises:
            StaleLease: somebody trained under another life of this server: that work is lost.
        """
        self._admission.check_lives(lives)
        if shared:
            sent, usable = self._slots.report(clients)
            return usable, sent.numpy()
        finite: list[bool] = []
        for at in range(0, len(clients), WRITTEN):
            finite += self._slots.report(clients[at : at + WRITTEN])[1]
        return finite, np.empty((len(clients), 0), np.float32)

    def stage_start(self) -> tuple[Staged, ...]:
        """Stage round 0: the one seeded start that every client shares."""
        self.forget()
        self._shared.start(self._seeded_P)
        self._staged = (
            *self._slots.stage_start(self._seeded_P),
            *self._shared.stage(0),
        )
        self._installed = 0
        return self._staged

    def shared_gradient(self, round: int, clients: Sequence[str]) -> np.ndarray:
        """What each client's round adds to the shared adapter's gradient [C, P].

        Raises:
            StaleLease: as `install`.
        """
        self._admission.check_turns(round, clients)
        self._finish(clients)
        return self._shared.rows(clients)

    def install(
        self,
        installation: Installation,
        shared_P: np.ndarray | None = None,
        stages_shared: bool = True,
    ) -> tuple[Staged, ...]:
        """Make the mixture the state of `round` and stage it; asked twice, answers the same.

        Without columns nothing is mixed: everybody keeps what it trained.

        Args:
            shared_P: the shared adapter's gradient, where there is one to step.
            stages_shared: False where another server writes it down.

        Raises:
            StaleLease: somebody's round was not trained in this life of the server.
        """
        round, refused = installation.round, set(installation.refused)
        if round == self._installed:
            return self._staged
        self._admission.check_turns(round, installation.clients)
        rows = [i for i, c in enumerate(installation.clients) if c not in refused]
        accepted = [installation.clients[i] for i in rows]
        mixed = bool(installation.theta_SP.shape[1])
        own = not (mixed and installation.common)
        self._finish(accepted)
        if mixed:
            theta = from_dlpack(installation.theta_SP)
            self._slots.replace(accepted, theta[rows] if refused else theta)
        self._shared.step(shared_P, round)
        self._staged = (
            *self._slots.stage(round, self._holder, accepted, own),
            *(self._shared.stage(round) if stages_shared else ()),
        )
        self._slots.release()
        self._shared.clear()
        self._admission.turns.clear()
        self._keep.clear()
        self._texts.caches.clear()
        self._installed = round
        return self._staged

    def expect(self, round: int, staged: Sequence[Staged]) -> None:
        """See `Rounds.expect`."""
        self._rounds.expect(round, staged)

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._slots.clear()
        self._shared.forget()
        self._residual.forget()
        self._admission.turns.clear()
        self._keep.clear()
        self._texts.caches.clear()
        self._installed = -1

    def _finish(self, clients: Sequence[str]) -> None:
        """They take no further step in this round."""
        if left := self._shared.left(clients):
            self._shared.finish(left, self._merger.find(left))
        self._slots.finish(clients)

    def _check(self, activation: Activation) -> Activation:
        """The message with all its rows; or it is refused."""
        self._admission.check(activation)
        if activation.lease is None:
            self._shared.bring(activation.round)
            self._residual.bring(activation.round)
        return self._recall.complete(activation)

    def _check_step(self, sent: tuple[Activation, Gradient]) -> tuple[Activation, Gradient]:
        activation, gradient = self._check(sent[0]), sent[1]
        self._admission.check_step(activation, gradient)
        return activation, gradient

    def _check_continuation(self, continuation: Continuation) -> Continuation:
        activation = continuation.activation
        if not self._texts.possible:
            raise FellrayError("an encoder's trunk was asked to continue a text")
        if activation.lease:
            raise FellrayError("a text was sent with a lease: nobody trains by writing")
        self._check(activation)
        if not follows(continuation):
            rows = len(activation.lengths_N)
            raise FellrayError(f"a continuation of {rows} rows does not add up")
        return continuation

    def _forward(self, activations: Sequence[Activation]) -> list[np.ndarray]:
        lanes, slots_K, keys = self._merger.lay(activations)
        batch = self._merger.load(lanes, slots_K, train=False)
        h_Md = self._merger.spread(lanes, self._wire.read_activations(activations))
        packed = self._engine.module.packed
        keep = all(a.lease for a in activations) and self._keep.make_room(
            packed.measure(lanes.num_tokens)
        )
        y_Md, saved = packed.forward(h_Md, batch, keep)
        if keep:
            self._keep.put(keys, lanes, saved)
        return self._wire.send_outputs(lanes.collect(y_Md), activations)

    def _backward(self, sent: Sequence[tuple[Activation, Gradient]]) -> list[np.ndarray]:
        activations = [activation for activation, _ in sent]
        lanes, slots_K, keys = self._merger.lay(activations)
        batch = self._merger.load(lanes, slots_K, train=True)
        h_Md = self._merger.spread(lanes, self._wire.read_activations(activations))
        saved = self._keep.take(keys, lanes, h_Md)
        if saved is None:
            _, saved = self._engine.module.packed.forward(h_Md, batch, keep=True)
        g_Md = self._merger.spread(lanes, self._wire.read_gradients(sent))
        down_Md = self._engine.backward(g_Md, saved, batch)
        stepped = slots_K.unique()
        self._slots.bank.step(stepped)
        for client, _, _ in keys:
            self._admission.turns[client].next_step += 1
        for activation, gradient in sent:
            if gradient.done:
                self._finish([c for c in activation.clients if c in gradient.done])
            if not self._wire.frozen:  # the bottom has changed since: its rows do not come again
                self._recall.drop(activation)
        return self._wire.send_inputs(lanes.collect(down_Md), activations)

    def _each(
        self,
        items: Sequence[Item],
        check: Callable[[Item], Item],
        run: Callable[[Sequence[Item]], list[np.ndarray]],
    ) -> list[np.ndarray | Exception]:
        """Run the items that pass their check in one batch; the others answer with the reason."""
        answers: list[np.ndarray | Exception | None] = []
        passed: list[Item] = []
        for item in items:
            try:
                passed.append(check(item))
                answers.append(None)
            except (FellrayError, StaleLease, Unheld) as error:
                answers.append(error)
        results = iter(run(passed) if passed else ())
        return [next(results) if answer is None else answer for answer in answers]
