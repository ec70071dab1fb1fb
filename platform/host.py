"""The trunk's host: frozen blocks, every client's personal adapters, batches of whoever waits.

It sees activations and gradients, never tokens or labels. Backward is given the inputs again: what
forward could not keep is computed once more, so a lost client or a lost server loses no more than a
step. Bits do not depend on who shares a batch: a client's rows of one step travel together, are
padded by a rule on them alone and summed in their order. It knows nothing of Ray or DeepSpeed.

Shapes: N rows, L real tokens, K lanes, M tokens in lanes, d width, C clients, P parameters.
"""

import uuid
from collections.abc import Callable, Collection, Hashable, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fellray.platform.adapters import Bank, GradientSum, Site, start, state_names
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.faults import require_committed
from fellray.platform.keep import Keep
from fellray.platform.kernel import Loras
from fellray.platform.lanes import Lanes
from fellray.platform.ledger import payload_bytes
from fellray.platform.manifest import Staged
from fellray.platform.messages import Activation, Gradient, Installation, Lease, StaleLease
from fellray.platform.packed import Batch
from fellray.platform.rounds import Rounds
from fellray.platform.trunk import Engine

Item = TypeVar("Item")


class TrunkHost:
    """Trains and serves the trunk for many clients. One thread at a time may call it."""

    def __init__(
        self,
        config: RunConfig,
        learners: Sequence[str],
        sites: Sequence[Site],
        engine: Engine,
        rounds: Rounds,
        device: torch.device | None = None,
    ):
        """Args: learners: sorted ids of everyone who trains, one bank row each."""
        self._seeded_P = start(sites, config.model.lora, config.seed)
        self._config = config
        self._device = device
        self._rounds = rounds
        self._engine = engine
        self._life = uuid.uuid4().hex
        self._learners = tuple(learners)
        self._slot = {learner: i for i, learner in enumerate(learners)}
        self._sites = sites
        lora, keep = config.model.lora, config.train.moments == "keep"
        self._keeps_moments = keep
        self._bank = Bank(sites, lora, config.train, len(learners), device)
        self._shared_gradient = GradientSum(sites, lora.r, len(learners), device)
        self._shared = config.server.shared_adapter
        self._keep = Keep(config.server.keep_graphs_mib * 2**20)
        self._lease = torch.zeros(len(learners), dtype=torch.int64, device=device)
        self._next_step = torch.zeros_like(self._lease)
        self._leases = 0
        self._round = -1
        self._start: dict[str, Tensor] = {}
        self._staged: tuple[Staged, ...] = ()

    def begin(self, run: str, round: int, clients: Sequence[str]) -> Lease:
        """Roll the clients back to the start of `round` and let them train it.

        Whatever an earlier try of this round left behind, a dead actor's half round say, is gone,
        and what still arrives from it is refused.
        """
        self._put_at(round - 1)
        slots = self._slots(clients)
        self._bank.reset(slots, self._start)
        self._shared_gradient.total_SP[slots] = 0.0
        self._leases += 1
        self._lease[slots] = self._leases
        self._next_step[slots] = 0
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

    def are_finite(self, lives: Collection[str], clients: Sequence[str]) -> list[bool]:
        """Whose trained trunk adapter holds neither a NaN nor an infinity.

        Raises:
            StaleLease: as `theta`.
        """
        self._check_lives(lives)
        finite: list[bool] = self._bank.values_SP[self._slots(clients)].isfinite().all(1).tolist()
        return finite

    def theta(self, lives: Collection[str], clients: Sequence[str]) -> np.ndarray:
        """The clients' trained trunk adapters [C, P].

        Raises:
            StaleLease: somebody trained under another life of this server: that work is lost.
        """
        self._check_lives(lives)
        return self._bank.values_SP[self._slots(clients)].cpu().numpy()

    def stage_start(self) -> tuple[Staged, ...]:
        """Stage round 0: the one seeded start that every client shares."""
        everyone = self._slots(self._learners)
        self._bank.reset(everyone, {"values": self._seeded_P.repeat(len(everyone), 1)})
        self._engine.load_shared({"values": self._seeded_P})
        return self._stage(0)

    def install(self, installation: Installation) -> tuple[Staged, ...]:
        """Make the mixture the state of `round` and stage it; asked twice, answers the same.

        Without columns nothing is mixed: everybody keeps what it trained.

        Raises:
            StaleLease: somebody's round was not trained in this life of the server.
        """
        if installation.round == self._round:
            return self._staged
        if not self._lease[self._slots(installation.clients)].all():
            raise StaleLease("the server was restarted after training")
        if installation.theta_SP.shape[1]:
            self._bank.values_SP[self._slots(installation.clients)] = torch.tensor(
                installation.theta_SP, device=self._device
            )
        self._bank.reset(self._slots(installation.refused), self._start)
        if self._shared:
            self._step_shared(sorted(set(installation.clients) - set(installation.refused)))
        return self._stage(installation.round)

    def forget(self) -> None:
        """Drop what is in memory: the next call starts from the last committed round."""
        self._round = -1

    def _stage(self, round: int) -> tuple[Staged, ...]:
        self._stand_at(round)
        personal = {f"trunk.{name}": t for name, t in self._start.items()}
        staged = [self._rounds.stage(round, "trunk", self._learners, personal)]
        if self._shared:
            shared = {f"shared.{name}": t for name, t in self._engine.shared_state().items()}
            staged.append(self._rounds.stage(round, "shared", (), shared))
        self._staged = tuple(staged)
        return self._staged

    def _put_at(self, round: int) -> None:
        if round == self._round:
            return
        require_committed(self._rounds, round)
        names = state_names("trunk", self._keeps_moments)
        loaded = self._rounds.load(round, self._learners, names)
        state = {name.removeprefix("trunk."): tensor for name, tensor in loaded.items()}
        self._bank.reset(self._slots(self._learners), state)
        if self._shared:
            kinds = ("values", "moment1", "moment2", "steps")
            self._engine.load_shared(
                {kind: self._rounds.load_shared(round, f"shared.{kind}") for kind in kinds}
            )
        self._stand_at(round)

    def _stand_at(self, round: int) -> None:
        self._round = round
        self._start = self._bank.state(self._keeps_moments)
        self._lease.zero_()

    def _step_shared(self, clients: Sequence[str]) -> None:
        """Client ids in order, fp64: neither batches nor arrival change the sum."""
        rows = self._shared_gradient.total_SP[self._slots(clients)].double()
        if len(rows):
            self._engine.step_shared(rows.sum(0).float() / len(rows))
        self._shared_gradient.total_SP.zero_()

    def _check_lives(self, lives: Collection[str]) -> None:
        if any(life != self._life for life in lives):
            raise StaleLease("the server was restarted during the round")

    def _check(self, activation: Activation) -> None:
        if activation.run != self._config.name:
            raise FellrayError(f"server of run {self._config.name} was asked by {activation.run}")
        if unknown := sorted(set(activation.clients) - set(self._learners)):
            raise FellrayError(f"client {unknown[0]} does not take part in this run")
        _check_shape(activation)
        slots = self._slots(activation.clients)
        if activation.lease is None:
            self._put_at(activation.round)
            if self._lease[slots].any():
                raise StaleLease(f"round {activation.round + 1} is being trained")
            return
        current = activation.lease.server == self._life and bool(
            (self._lease[slots] == activation.lease.number).all()
        )
        if not current:
            raise StaleLease(f"round {activation.round} was begun again")

    def _check_step(self, sent: tuple[Activation, Gradient]) -> None:
        activation, gradient = sent
        self._check(activation)
        if gradient.g_Ld.shape != activation.h_Ld.shape:
            shapes = f"{gradient.g_Ld.shape} for hidden states of {activation.h_Ld.shape}"
            raise FellrayError(f"a gradient of shape {shapes} does not add up")
        slots = self._slots(activation.clients)
        key = (activation.run, activation.round, activation.step)
        expected = bool((self._next_step[slots] == activation.step).all())
        if key != (gradient.run, gradient.round, gradient.step) or not expected:
            raise StaleLease(f"step {activation.step} of round {activation.round} is not due")

    def _forward(self, activations: Sequence[Activation]) -> list[np.ndarray]:
        lanes, slots_K, keys = self._lay(activations)
        batch = self._load(lanes, slots_K, train=False)
        h_Md = self._spread(lanes, [activation.h_Ld for activation in activations])
        packed = self._engine.module.packed
        keep = all(a.lease for a in activations) and self._keep.make_room(
            packed.measure(lanes.num_tokens)
        )
        y_Md, saved = packed.forward(h_Md, batch, keep)
        if keep:
            self._keep.put(keys, lanes, saved)
        return _part(lanes.collect(y_Md), activations)

    def _backward(self, sent: Sequence[tuple[Activation, Gradient]]) -> list[np.ndarray]:
        activations = [activation for activation, _ in sent]
        lanes, slots_K, keys = self._lay(activations)
        batch = self._load(lanes, slots_K, train=True)
        h_Md = self._spread(lanes, [activation.h_Ld for activation in activations])
        saved = self._keep.take(keys, lanes, h_Md)
        if saved is None:
            _, saved = self._engine.module.packed.forward(h_Md, batch, keep=True)
        g_Md = self._spread(lanes, [gradient.g_Ld for _, gradient in sent])
        down_Md = self._engine.backward(g_Md, saved, batch)
        stepped = slots_K.unique()
        self._bank.step(stepped)
        self._next_step[stepped] += 1
        return _part(lanes.collect(down_Md), activations)

    def _lay(self, activations: Sequence[Activation]) -> tuple[Lanes, Tensor, list[Hashable]]:
        """Lanes, and whose each of them is: its slot, and under what its pass is kept."""
        lengths = np.concatenate([a.lengths_N for a in activations]).astype(np.int64)
        owners = [a.row_client_N.astype(np.int64) for a in activations]
        used = [np.unique(owner, return_inverse=True) for owner in owners]
        starts = np.cumsum([0, *(len(clients) for clients, _ in used)])
        lane_N = np.concatenate([own + at for (_, own), at in zip(used, starts, strict=False)])
        keys: list[tuple[str, Lease | None, int]] = [
            (a.clients[client], a.lease, a.step)
            for a, (clients, _) in zip(activations, used, strict=True)
            for client in clients.tolist()
        ]
        slots_K = self._slots([client for client, _, _ in keys])
        lanes = Lanes(
            torch.from_numpy(lengths),
            torch.from_numpy(lane_N),
            self._config.model.pad_multiple,
            self._bank.ranks_S[slots_K].cpu(),
            self._device,
        )
        order = lanes.order_K.tolist()
        return lanes, slots_K[lanes.order_K.to(self._device)], [keys[lane] for lane in order]

    def _load(self, lanes: Lanes, slots_K: Tensor, train: bool) -> Batch:
        """The lanes with every set of their adapters, and where the gradients go if `train`."""
        spec, stacks, bank = self._config.model.lora, lanes.stacks, self._bank

        def load(ranks: Sequence[int], values_SP: Tensor, sums: GradientSum) -> Loras:
            gradient_SP = sums.total_SP if train else None
            return Loras(
                self._sites, stacks, ranks, spec.scaling_of, slots_K, values_SP, gradient_SP
            )

        sets = [load([stack.rank for stack in stacks], bank.values_SP, bank.gradient)]
        if self._shared:
            common_SP = self._engine.module.shared_P.detach().expand(len(self._learners), -1)
            sets.append(load([spec.r] * len(stacks), common_SP, self._shared_gradient))
        return Batch(lanes, sets)

    def _spread(self, lanes: Lanes, arrays: Sequence[np.ndarray]) -> Tensor:
        return lanes.spread(_join(arrays).to(self._device))

    def _slots(self, clients: Sequence[str]) -> Tensor:
        places = [self._slot[c] for c in clients]
        return torch.tensor(places, dtype=torch.int64, device=self._device)

    def _each(
        self,
        items: Sequence[Item],
        check: Callable[[Item], None],
        run: Callable[[Sequence[Item]], list[np.ndarray]],
    ) -> list[np.ndarray | Exception]:
        """Run the items that pass their check in one batch; the others answer with the reason."""
        answers: list[np.ndarray | Exception | None] = []
        for item in items:
            try:
                check(item)
                answers.append(None)
            except (FellrayError, StaleLease) as error:
                answers.append(error)
        passed = [item for item, answer in zip(items, answers, strict=True) if answer is None]
        results = iter(run(passed) if passed else ())
        return [next(results) if answer is None else answer for answer in answers]


class InProcess:
    """A host in this process as a `Remote`: the peer of the one behind Ray."""

    def __init__(self, host: TrunkHost):
        self._host = host
        self.bytes = 0

    def begin(self, run: str, round: int, clients: tuple[str, ...]) -> Lease:
        """See `Remote`."""
        return self._host.begin(run, round, clients)

    def forward(self, activation: Activation) -> np.ndarray:
        """See `Remote`."""
        output = _only(self._host.forward([activation]))
        self.bytes += payload_bytes(activation, output)
        return output

    def backward(self, activation: Activation, gradient: Gradient) -> np.ndarray:
        """See `Remote`."""
        down = _only(self._host.backward([(activation, gradient)]))
        self.bytes += payload_bytes(activation, gradient, down)
        return down


def _check_shape(activation: Activation) -> None:
    rows, places = len(activation.lengths_N), activation.row_client_N
    adds_up = (
        activation.h_Ld.ndim == 2
        and len(places) == rows > 0
        and int(activation.lengths_N.min()) > 0
        and int(activation.lengths_N.sum()) == len(activation.h_Ld)
        and 0 <= int(places.min()) <= int(places.max()) < len(activation.clients)
    )
    if not adds_up:
        raise FellrayError(
            f"an activation of {rows} rows and shape {activation.h_Ld.shape} does not add up"
        )


def _only(answers: Sequence[np.ndarray | Exception]) -> np.ndarray:
    (answer,) = answers
    if isinstance(answer, Exception):
        raise answer
    return answer


def _join(arrays: Sequence[np.ndarray]) -> Tensor:
    """One tensor of several messages' tokens; a single message is not copied."""
    return from_dlpack(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))


def _part(packed_Ld: Tensor, activations: Sequence[Activation]) -> list[np.ndarray]:
    """Each message's own tokens, as views."""
    sizes = [len(a.h_Ld) for a in activations]
    return [part.numpy() for part in packed_Ld.cpu().split(sizes)]
