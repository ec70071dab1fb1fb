"""Figures: each a ratio of two arms that are timed in turn on the same samples with stated threads.

How long a run of them takes, and what becomes of the numbers, is the bench's business.

Shapes: L tokens of a message, d width.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fellray.actors.client import Client
from fellray.actors.plant import Plant
from fellray.actors.pool import RayPool, Shared
from fellray.actors.remote import RayRemote
from fellray.actors.server import Server, make_host
from fellray.actors.world import World
from fellray.jobs.display import console
from fellray.jobs.released import Released
from fellray.jobs.timings import Taken, interleave, ratios, spread
from fellray.jobs.train import one_round
from fellray.jobs.whole import Whole, tokens_per_step
from fellray.platform import config as configs
from fellray.platform.aggregation import reduce
from fellray.platform.config import RunConfig
from fellray.platform.host import TrunkHost
from fellray.platform.in_process import InProcess
from fellray.platform.ledger import total
from fellray.platform.messages import Activation, Gradient, Lease
from fellray.platform.places import Demand
from fellray.platform.rounds import Rounds
from fellray.platform.split import PARTS, plan_cut
from fellray.platform.storage import Storage

TURNS = 5
"""Timed turns of each arm, at least."""
CORES = 2
"""What every process of a run shares, and the most threads of any."""

Figure = dict[str, Any]
"""`name`, `ratio` of the arms `of`, `goal`, `arms` with their seconds, and what else there is."""


def measure_split(config: RunConfig, world: World, threads: int, crews: int) -> Figure:
    """A training step with the trunk behind a server actor, over the whole model in one process.

    As many clients train side by side as there are crews. A third arm drops what forward passes
    leave for their backward and computes them twice; a fourth has the trunk in the client's own
    process: what Ray adds to it is transport.
    """
    config = vary(
        config,
        clients={"threads": threads, "crews": crews, "per_actor": crews},
        server={"threads": threads, "engine": "torch"},
        train={"batch_size": 32, "local_samples": 64},
    )
    learners = tuple(sorted(world.seats)[:crews])
    seats, side = {learner: (learner,) for learner in learners}, world.client_side(config)
    trunk = Shared(f"trunk {world.key(config)}", world.trunk_side(config))
    far = Demand("server", 1, 1.0, 0.0)
    servers = []

    def behind_ray(name: str, config: RunConfig) -> Client:
        rounds = _rounds(config, f"{name}-{threads}-{crews}")
        server = RayPool(Server, [(config, learners, trunk, rounds)], far, console.print)
        servers.append(server)
        remote = RayRemote(server.handles)
        client = Client(config, 0, seats, side, world.catalogue, remote, rounds)
        rounds.commit(0, [*server.map("stage_start")[0], *client.stage_start()], {})
        return client

    def in_process(config: RunConfig) -> Client:
        rounds = _rounds(config, f"here-{threads}-{crews}")
        host = make_host(config, learners, world.trunk_side(config), rounds)
        client = Client(config, 0, seats, side, world.catalogue, InProcess(host), rounds)
        rounds.commit(0, [*host.stage_start(), *client.stage_start()], {})
        return client

    kept, here = behind_ray("kept", config), in_process(config)
    twice = behind_ray("twice", vary(config, server={"keep_graphs_mib": 0}))
    whole = Whole(config, learners, world.backbone, world.catalogue)
    losses = [client.fit(1, learners).losses for client in (kept, twice, here)]
    arms = {
        "split through Ray": lambda: kept.fit(1, learners),
        "computed twice": lambda: twice.fit(1, learners),
        "split in one process": lambda: here.fit(1, learners),
        "whole": lambda: whole.fit(1),
    }
    taken = interleave(arms, TURNS)
    for server in servers:
        server.close()
    through, again, inside, plain = (taken[name].wall for name in arms)
    return figure(
        f"split / whole, {crews} crew(s), {threads} thread(s)",
        taken,
        ("split through Ray", "whole"),
        goal=("<=", 1.05),
        tokens=tokens_per_step(config, learners, world.catalogue),
        parts={
            "computed twice / whole (goal 1.35)": asdict(ratios(again, plain)),
            "in one process / whole": asdict(ratios(inside, plain)),
            "through Ray / in one process": asdict(ratios(through, inside)),
        },
        equal_bits=len({*losses, whole.fit(1)}) == 1,
    )


def measure_batching(config: RunConfig, world: World, tokens: int, threads: int) -> Figure:
    """Sixteen clients of one row each: sixteen server calls, over one merged batch."""
    config = vary(config, server={"threads": threads, "engine": "torch"})
    names = _names(16)
    host, lease = _open_host(config, world, names, f"batch-{tokens}-{threads}")
    sent = make_messages(config, lease, [(name,) for name in names], 1, tokens, world.backbone.dim)
    alone = [_answers(host.forward([activation]))[0] for activation, _ in sent]
    merged = _answers(host.forward([activation for activation, _ in sent]))
    steps = itertools.count()
    taken = interleave(
        {
            "one call per client": lambda: train_step(host, [[one] for one in sent], next(steps)),
            "merged": lambda: train_step(host, [sent], next(steps)),
        },
        2 * TURNS,
    )
    return figure(
        f"one by one / merged, 16 clients x {tokens} tokens, {threads} thread(s)",
        taken,
        ("one call per client", "merged"),
        goal=(">=", 3.0 if tokens == 16 else 1.8),
        tokens=16 * tokens,
        equal_bits=all(np.array_equal(a, b) for a, b in zip(alone, merged, strict=True)),
    )


def measure_round(config: RunConfig, world: World) -> Figure:
    """One round in the order of the released code, over one of ours, for the same samples.

    Ours has one actor per client and the DeepSpeed server; a round ends with its commit. Starting
    the actors, once per run, is not in it; loading the model is in the other's every round.
    """
    config = vary(
        config,
        clients={"per_actor": 1, "threads": 1, "cpus": 0.5},
        server={"threads": CORES, "engine": "deepspeed"},
    )
    rounds = _rounds(config, "round")
    released = Released(config, world, threads=CORES)
    with Plant.on_ray(config, world, rounds) as plant:
        rounds.commit(0, plant.stage_start(), {})
        ours, theirs = itertools.count(1), itertools.count(1)
        losses: dict[str, list[float]] = {"ours": [], "released": []}

        def our_round() -> None:
            t = next(ours)
            outcome = one_round(plant, t, config)
            rounds.commit(t, outcome.staged, {})
            assert outcome.reports is not None
            losses["ours"].append(float(np.mean(list(outcome.reports.losses.values()))))

        def released_round() -> None:
            losses["released"].append(float(np.mean(released.train_round(next(theirs)))))

        taken = interleave({"released order": released_round, "ours": our_round}, TURNS)
    loading = released.loading / (TURNS + 1)
    without = [seconds - loading for seconds in taken["released order"].wall]
    return figure(
        f"released order / ours, a round of {len(world.seats)} clients",
        taken,
        ("released order", "ours"),
        goal=None,
        without_loading=asdict(ratios(without, taken["ours"].wall)),
        loading_s=loading,
        first_loss={name: values[0] for name, values in losses.items()},
    )


def measure_engines(config: RunConfig, world: World) -> Figure:
    """The server's step under DeepSpeed, over the same under plain torch."""
    names = _names(16)
    hosts, sent = {}, {}
    for engine in ("deepspeed", "torch"):
        one = vary(config, server={"threads": CORES, "engine": engine})
        hosts[engine], lease = _open_host(one, world, names, engine)
        sent[engine] = make_messages(one, lease, [names], 4, 64, world.backbone.dim)
    steps = {engine: itertools.count() for engine in hosts}
    first = {e: train_step(hosts[e], [sent[e]], next(steps[e])) for e in hosts}
    taken = interleave(
        {
            "deepspeed": lambda: train_step(
                hosts["deepspeed"], [sent["deepspeed"]], next(steps["deepspeed"])
            ),
            "torch": lambda: train_step(hosts["torch"], [sent["torch"]], next(steps["torch"])),
        },
        TURNS,
    )
    pairs = zip(first["deepspeed"], first["torch"], strict=True)
    return figure(
        f"DeepSpeed / torch, server step, {CORES} threads",
        taken,
        ("deepspeed", "torch"),
        goal=None,
        tokens=16 * 4 * 64,
        equal_bits=all(np.array_equal(a, b) for a, b in pairs),
    )


def count_bytes(config: RunConfig, world: World) -> dict[str, Any]:
    """Bytes of one client in one round: the ledger's, beside what two other protocols would send.

    LoRA FedAvg sends all adapters up and down, full-model FedAvg all parameters; both fp32.
    """
    config = vary(config, server={"threads": CORES, "engine": "torch"})
    rounds = _rounds(config, "bytes")
    plant = Plant.inline(config, world, rounds)
    rounds.commit(0, plant.stage_start(), {})
    reports = plant.fit(1, plant.sample(1))
    plan = config.method.plan(reports.meta)
    plant.install(reports, plan, reduce(plan, reports.theta_CP, reports.blocks))
    kinds = total(plant.close_ledger())
    cut = plan_cut(world.backbone, config.model)
    adapters = sum(s.num_parameters(config.model.lora.r) for p in PARTS for s in cut.sites[p])
    weights = sum(a.size for a in world.backbone.arrays.values() if a.dtype.kind == "f")
    split = {kind: count / len(world.seats) for kind, count in kinds.items()}
    return {
        "samples": config.train.local_samples,
        "by_kind": split,
        **compare_bytes(sum(split.values()), adapters, weights),
    }


def compare_bytes(split: float, adapters: int, weights: int) -> dict[str, dict[str, float]]:
    """Bytes per client and round of three protocols, and each over full-model FedAvg."""
    sizes = {
        "split": split,
        "LoRA FedAvg": float(2 * 4 * adapters),
        "full-model FedAvg": float(2 * 4 * weights),
    }
    whole = sizes["full-model FedAvg"]
    return {"bytes": sizes, "over_full_model": {name: n / whole for name, n in sizes.items()}}


def make_messages(
    config: RunConfig,
    lease: Lease,
    actors: Sequence[tuple[str, ...]],
    rows: int,
    tokens: int,
    dim: int,
) -> list[tuple[Activation, Gradient]]:
    """One message per actor with noise for hidden states, `rows` rows of each of its clients."""
    draw = np.random.default_rng(0)
    messages = []
    for clients in actors:
        count = len(clients) * rows
        h_Ld, g_Ld = draw.standard_normal((2, count * tokens, dim), dtype=np.float32)
        activation = Activation(
            run=config.name,
            round=1,
            step=0,
            lease=lease,
            clients=clients,
            row_client_N=np.repeat(np.arange(len(clients), dtype=np.int32), rows),
            lengths_N=np.full(count, tokens, np.int32),
            h_Ld=h_Ld,
        )
        messages.append((activation, Gradient(config.name, 1, 0, g_Ld)))
    return messages


def train_step(
    host: TrunkHost, calls: Sequence[Sequence[tuple[Activation, Gradient]]], step: int
) -> list[np.ndarray]:
    """Forward and backward of every call; all answers."""
    answers = []
    for call in calls:
        sent = [(replace(a, step=step), replace(g, step=step)) for a, g in call]
        answers += _answers(host.forward([activation for activation, _ in sent]))
        answers += _answers(host.backward(sent))
    return answers


def vary(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    """The config with some keys of some sections changed."""
    tree = config.model_dump(mode="json")
    for name, changed in sections.items():
        tree[name] |= changed
    return configs.parse(tree, "bench")


def is_met(goal: tuple[str, float] | None, ratio: float) -> bool | None:
    """Whether a ratio reaches its goal; None without one."""
    if goal is None:
        return None
    return ratio <= goal[1] if goal[0] == "<=" else ratio >= goal[1]


def figure(
    name: str,
    taken: Mapping[str, Taken],
    of: tuple[str, str],
    goal: tuple[str, float] | None,
    **more: Any,
) -> Figure:
    """One ratio, by the wall and by this process's processor time."""
    over, under = (taken[arm] for arm in of)
    ratio = ratios(over.wall, under.wall)
    cpu = [sum(taken[arm].cpu) for arm in of]
    return {
        "name": name,
        "of": of,
        "ratio": asdict(ratio),
        "ratio_cpu": cpu[0] / cpu[1] if cpu[1] else None,
        "goal": goal,
        "met": is_met(goal, ratio.median),
        "arms": {
            arm: {"wall": asdict(spread(t.wall)), "cpu": asdict(spread(t.cpu))}
            for arm, t in taken.items()
        },
        **more,
    }


def _open_host(
    config: RunConfig, world: World, names: tuple[str, ...], figure: str
) -> tuple[TrunkHost, Lease]:
    rounds = _rounds(config, figure)
    host = make_host(config, names, world.trunk_side(config), rounds)
    rounds.commit(0, host.stage_start(), {})
    return host, host.begin(config.name, 1, names)


def _answers(answers: Sequence[np.ndarray | Exception]) -> list[np.ndarray]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [answer for answer in answers if isinstance(answer, np.ndarray)]


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"client{i:02d}" for i in range(count))


def _rounds(config: RunConfig, figure: str) -> Rounds:
    return Rounds(Storage(config.storage).sub(figure))
