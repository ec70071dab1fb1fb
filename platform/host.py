"""The trunk's host: frozen blocks, every client's personal adapters, batches of whoever waits.

It sees activations and gradients, never tokens or labels. Backward is given the inputs again: what
forward could not keep is computed once more, so a lost client or a lost server loses no more than a
step. Bits do not depend on who shares a batch: a client's rows of one step travel together, are
padded by a rule on them alone and summed in their order. It knows nothing of Ray or DeepSpeed.

Shapes: N rows, L real tokens, K lanes, M tokens in lanes, d width, C clients, P parameters.
"""

import uuid
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.platform.adapters import Bank, GradientSum, Site, start
from fellray.platform.caches import Cache, Caches, Stretches
from fellray.platform.causal import CausalBlocks, Look
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.faults import committed
from fellray.platform.keep import Keep
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.ledger import payload_bytes
from fellray.platform.manifest import Staged
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
from fellray.platform.packed import Batch
from fellray.platform.recall import Recall
from fellray.platform.rounds import Rounds
from fellray.platform.slots import WRITTEN, Slots
from fellray.platform.span import Answer
from fellray.platform.trunk import Engine
from fellray.platform.wire import Wire

Item = TypeVar("Item")


@dataclass
class _Turn:
    """A client's leave to train a round."""

    round: int
    lease: int
    next_step: int = 0


_Key = tuple[str, Lease | None, int]
"""Client, lease, step: under what a forward pass is kept."""


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
        self._config = config
        self._device = device
        self._rounds = rounds
        self._engine = engine
        self._life = uuid.uuid4().hex
        self._learners = frozenset(learners) if isinstance(learners, Sequence) else learners
        self._sites = sites
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
        self._shared = config.server.shared_adapter
        self._shared_gradient = GradientSum(sites, lora.r, 0, device)
        self._summed: dict[str, Tensor] = {}
        """The share [P] in the common gradient of clients who are through with the round."""
        self._shared_round = -1
        self._keep = Keep(config.server.keep_graphs_mib * 2**20)
        self._recall = Recall(config.wire.keep_rows_mib * 2**20)
        self._wire = Wire(config, engine.module.packed.dim)
        self._caches = Caches(config.server.cache_mib * 2**20)
        self._turns: dict[str, _Turn] = {}
        self._leases = 0
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
        self._caches.clear()
        if self._rule.twin and not twin and not self._slots.have_twins(clients):
            raise StaleLease("the server was restarted during the round")
        self._bring_shared(round - 1)
        slots = self._slots.hold(round - 1, clients)
        self._slots.train(clients, twin)
        self._leases += 1
        self._turns |= {client: _Turn(round, self._leases) for client in clients}
        if self._shared:
            self._fit_shared_gradient()
            self._shared_gradient.total_SP[slots] = 0.0
            for client in clients:
                self._summed.pop(client, None)
        return Lease(self._life, self._leases)

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
            answers += self._each(list(alike), self._check_continuation, self._extend)
        return answers

    def report(
        self, lives: Collection[str], clients: Sequence[str], shared: bool
    ) -> tuple[list[bool], np.ndarray]:
        """Whose trained trunk adapter is finite, and the adapters [C, P]; no columns if not shared.

        Raises:
            StaleLease: somebody trained under another life of this server: that work is lost.
        """
        self._check_lives(lives)
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
        self._engine.load_shared({"values": self._seeded_P})
        self._shared_round = 0
        self._staged = (
            *self._slots.stage_start(self._seeded_P),
            *self._stage_shared(0),
        )
        self._installed = 0
        return self._staged

    def shared_gradient(self, round: int, clients: Sequence[str]) -> np.ndarray:
        """What each client's round adds to the shared adapter's gradient [C, P].

        Raises:
            StaleLease: as `install`.
        """
        self._check_turns(round, clients)
        self._finish(clients)
        width = self._shared_gradient.total_SP.shape[1]
        rows = [self._summed[c].cpu() for c in clients]
        return (torch.stack(rows) if rows else torch.empty(0, width)).numpy()

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
        self._check_turns(round, installation.clients)
        rows = [i for i, c in enumerate(installation.clients) if c not in refused]
        accepted = [installation.clients[i] for i in rows]
        mixed = bool(installation.theta_SP.shape[1])
        own = not (mixed and installation.common)
        self._finish(accepted)
        if mixed:
            theta = from_dlpack(installation.theta_SP)
            self._slots.replace(accepted, theta[rows] if refused else theta)
        if self._shared:
            if shared_P is not None:
                self._engine.step_shared(from_dlpack(shared_P).to(self._device))
            self._shared_gradient.total_SP.zero_()
            self._shared_round = round
        self._staged = (
            *self._slots.stage(round, self._holder, accepted, own),
            *(self._stage_shared(round) if stages_shared else ()),
        )
        self._slots.release()
        self._summed.clear()
        self._turns.clear()
        self._keep.clear()
        self._caches.clear()
        self._installed = round
        return self._staged

    def expect(self, round: int, staged: Sequence[Staged]) -> None:
        """See `Rounds.expect`."""
        self._rounds.expect(round, staged)

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._slots.clear()
        self._summed.clear()
        self._turns.clear()
        self._keep.clear()
        self._caches.clear()
        self._shared_round = self._installed = -1

    def _stage_shared(self, round: int) -> tuple[Staged, ...]:
        if not self._shared:
            return ()
        state = {f"shared.{name}": t for name, t in self._engine.shared_state().items()}
        return (self._rounds.stage(round, "shared", (), state),)

    def _bring_shared(self, round: int) -> None:
        if self._shared and round != self._shared_round:
            kinds = ("values", "moment1", "moment2", "steps")
            with committed(self._rounds, round):
                state = {kind: self._rounds.load_shared(round, f"shared.{kind}") for kind in kinds}
            self._engine.load_shared(state)
            self._shared_round = round

    def _fit_shared_gradient(self) -> None:
        rows = len(self._slots.bank.values_SP)
        old = self._shared_gradient.total_SP
        if len(old) < rows:
            lora = self._config.model.lora
            self._shared_gradient = GradientSum(self._sites, lora.r, rows, self._device)
            self._shared_gradient.total_SP[: len(old)] = old

    def _check_turns(self, round: int, clients: Sequence[str]) -> None:
        turns = [self._turns.get(c) for c in clients]
        if not all(turn and turn.round == round for turn in turns):
            raise StaleLease("the server was restarted after training")

    def _finish(self, clients: Sequence[str]) -> None:
        """They take no further step in this round."""
        if self._shared:
            left = [c for c in clients if c not in self._summed]
            rows = self._shared_gradient.total_SP[self._find(left)]
            self._summed |= dict(zip(left, rows, strict=True))
        self._slots.finish(clients)

    def _check_lives(self, lives: Collection[str]) -> None:
        if any(life != self._life for life in lives):
            raise StaleLease("the server was restarted during the round")

    def _check(self, activation: Activation) -> Activation:
        """The message with all its rows; or it is refused."""
        if activation.run != self._config.name:
            raise FellrayError(f"server of run {self._config.name} was asked by {activation.run}")
        if unknown := [c for c in activation.clients if c not in self._learners]:
            raise FellrayError(f"client {unknown[0]} does not take part in this run")
        if not (_adds_up(activation) and self._wire.fits(activation)):
            shape = f"{len(activation.lengths_N)} rows and shape {activation.h_Ld.shape}"
            raise FellrayError(f"an activation of {shape} does not add up")
        turns = [self._turns.get(c) for c in activation.clients]
        lease = activation.lease
        if lease is None:
            if any(turns):
                raise StaleLease(f"round {activation.round + 1} is being trained")
            self._bring_shared(activation.round)
            return self._recall.complete(activation)
        current = lease.server == self._life and all(
            turn is not None and turn.lease == lease.number for turn in turns
        )
        if not current:
            raise StaleLease(f"round {activation.round} was begun again")
        return self._recall.complete(activation)

    def _check_step(self, sent: tuple[Activation, Gradient]) -> tuple[Activation, Gradient]:
        activation, gradient = self._check(sent[0]), sent[1]
        if not self._wire.answers(activation, gradient):
            shapes = f"{gradient.g_Ld.shape} for hidden states of {activation.h_Ld.shape}"
            raise FellrayError(f"a gradient of shape {shapes} does not add up")
        key = (activation.run, activation.round, activation.step)
        expected = all(self._turns[c].next_step == activation.step for c in activation.clients)
        if key != (gradient.run, gradient.round, gradient.step) or not expected:
            raise StaleLease(f"step {activation.step} of round {activation.round} is not due")
        return activation, gradient

    def _check_continuation(self, continuation: Continuation) -> Continuation:
        activation, parent_N = continuation.activation, continuation.parent_N
        if not isinstance(self._engine.module.packed, CausalBlocks):
            raise FellrayError("an encoder's trunk was asked to continue a text")
        if activation.lease:
            raise FellrayError("a text was sent with a lease: nobody trains by writing")
        self._check(activation)
        rows, begins = len(activation.lengths_N), bool((parent_N < 0).all())
        held_N = continuation.held_N
        if not (
            len(parent_N) == len(held_N) == rows
            and (not held_N.any() if begins else int(parent_N.min()) >= 0 and int(held_N.min()) > 0)
        ):
            raise FellrayError(f"a continuation of {rows} rows does not add up")
        return continuation

    def _extend(self, continuations: Sequence[Continuation]) -> list[np.ndarray]:
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
        cache = self._caches.take(continuation.text)
        if cache is None or int(parent_N.max()) >= len(cache.lengths_N):
            return None
        cache.follow(parent_N)
        same = np.array_equal(cache.lengths_N.numpy(), continuation.held_N)
        return cache if same else None

    def _write(self, ready: Sequence[tuple[Continuation, Cache]]) -> list[np.ndarray]:
        activations = [continuation.activation for continuation, _ in ready]
        lanes, slots_K, _ = self._lay(activations)
        plain = ready[0][0].plain
        batch = Batch(lanes, []) if plain else self._load(lanes, slots_K, train=False)
        multiple, looks = self._config.model.pad_multiple, []
        for continuation, cache in ready:
            lengths_N = torch.from_numpy(continuation.activation.lengths_N.astype(np.int64))
            rows = Stretches(cache.lengths_N, lengths_N, multiple, self._device)
            cache.lengths_N = cache.lengths_N + lengths_N
            looks.append(Look(rows, cache))
        h_Md = self._spread(lanes, self._wire.read_activations(activations))
        packed = self._engine.module.packed
        assert isinstance(packed, CausalBlocks)
        y_Md = packed.extend(h_Md, batch, looks)
        for continuation, cache in ready:
            if continuation.goes_on:
                self._caches.put(continuation.text, cache)
        return self._wire.send_outputs(lanes.collect(y_Md), activations)

    def _forward(self, activations: Sequence[Activation]) -> list[np.ndarray]:
        lanes, slots_K, keys = self._lay(activations)
        batch = self._load(lanes, slots_K, train=False)
        h_Md = self._spread(lanes, self._wire.read_activations(activations))
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
        lanes, slots_K, keys = self._lay(activations)
        batch = self._load(lanes, slots_K, train=True)
        h_Md = self._spread(lanes, self._wire.read_activations(activations))
        saved = self._keep.take(keys, lanes, h_Md)
        if saved is None:
            _, saved = self._engine.module.packed.forward(h_Md, batch, keep=True)
        g_Md = self._spread(lanes, self._wire.read_gradients(sent))
        down_Md = self._engine.backward(g_Md, saved, batch)
        stepped = slots_K.unique()
        self._slots.bank.step(stepped)
        for client, _, _ in keys:
            self._turns[client].next_step += 1
        for activation, gradient in sent:
            if gradient.done:
                self._finish([c for c in activation.clients if c in gradient.done])
            if not self._wire.frozen:  # the bottom has changed since: its rows do not come again
                self._recall.drop(activation)
        return self._wire.send_inputs(lanes.collect(down_Md), activations)

    def _lay(self, activations: Sequence[Activation]) -> tuple[Lanes, Tensor, list[_Key]]:
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
        slots_K = self._find([client for client, _, _ in keys])
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

    def _load(self, lanes: Lanes, slots_K: Tensor, train: bool) -> Batch:
        """The lanes with every set of their adapters, and where the gradients go if `train`."""
        spec, stacks, bank = self._config.model.lora, lanes.stacks, self._slots.bank

        def load(ranks: Sequence[int], values_SP: Tensor, sums: GradientSum) -> Loras:
            gradient_SP = sums.total_SP if train else None
            return Loras(
                self._sites, stacks, ranks, spec.scaling_of, slots_K, values_SP, gradient_SP
            )

        sets = [load([stack.rank for stack in stacks], bank.values_SP, bank.gradient)]
        if self._shared:
            common_SP = self._engine.module.shared_P.detach().expand(len(bank.values_SP), -1)
            sets.append(load([spec.r] * len(stacks), common_SP, self._shared_gradient))
        return Batch(lanes, sets)

    def _spread(self, lanes: Lanes, packed_Ld: Tensor) -> Tensor:
        return lanes.spread(packed_Ld.to(self._device, self._engine.module.dtype))

    def _find(self, clients: Sequence[str]) -> Tensor:
        return self._slots.find(clients).to(self._device)

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


class InProcess:
    """Hosts in this process as a `Remote`: the peer of the one behind Ray."""

    def __init__(self, *hosts: TrunkHost):
        self._hosts = hosts
        self._host = hosts[0]
        self.bytes = 0

    def choose(self, server: int) -> None:
        """See `Remote`."""
        self._host = self._hosts[server]

    def begin(
        self, run: str, round: int, clients: tuple[str, ...], twin: bool = False
    ) -> Callable[[], Lease]:
        """See `Remote`."""
        lease = self._host.begin(run, round, clients, twin)
        return lambda: lease

    def forward(self, activation: Activation) -> Answer:
        """See `Remote`."""
        (answer,) = self._host.forward([activation])
        return self._hand_over(answer, activation)

    def backward(self, activation: Activation, gradient: Gradient) -> Answer:
        """See `Remote`."""
        (answer,) = self._host.backward([(activation, gradient)])
        return self._hand_over(answer, activation, gradient)

    def _hand_over(
        self, answer: np.ndarray | Exception, *sent: Activation | Gradient | np.ndarray
    ) -> Answer:
        if isinstance(answer, Exception):
            if isinstance(answer, Unheld):
                self.bytes += payload_bytes(*sent)
            raise_later = answer
            return lambda: _refuse(raise_later)
        self.bytes += payload_bytes(*sent, answer)
        return lambda: answer

    def extend(self, continuation: Continuation) -> Answer:
        """See `Remote`."""
        (answer,) = self._host.extend([continuation])
        places = (continuation.parent_N, continuation.held_N)
        return self._hand_over(answer, continuation.activation, *places)


def _adds_up(activation: Activation) -> bool:
    rows, places = len(activation.lengths_N), activation.row_client_N
    names, sent_N = activation.names_NB, activation.sent_N
    sent = activation.lengths_N if sent_N is None else activation.lengths_N[sent_N[:rows]]
    return bool(
        len(places) == rows > 0
        and int(activation.lengths_N.min()) > 0
        and (names is None) == (sent_N is None)
        and (names is None or sent_N is None or len(names) == len(sent_N) == rows)
        and int(sent.sum()) == len(activation.h_Ld)
        and 0 <= int(places.min()) <= int(places.max()) < len(activation.clients)
    )


def _refuse(error: Exception) -> np.ndarray:
    raise error
