"""Bench of the service: load over real HTTP, beside what it is measured against, in turns.

All processes are held on the same cores, the one that asks too. Figures are ratios of arms that
took turns in one run, and CPU-seconds stand beside.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fellray.jobs.adapter_load import measure_adapters
from fellray.jobs.arrivals import draw_owners, weigh_zipf
from fellray.jobs.forward_loop import ForwardLoop
from fellray.jobs.generator import Answered, Generator, Load, Question, ask_for
from fellray.jobs.load_figures import HELD, judge
from fellray.jobs.load_settings import CORES, Settings
from fellray.jobs.service import Service, start_run, start_stock
from fellray.jobs.stock import ROOMY
from fellray.jobs.tally import add_errors, find_quantile
from fellray.jobs.timings import BUSY, load_average, spread
from fellray.jobs.wire import Target
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset
from fellray.serve.args import Args

SHARES = (0.3, 0.5, 0.7, 0.85)
"""Of saturation: the rates of the open loops."""
NOOP = Question("GET", "/healthz")
Say = Callable[[str, float], None]
"""What is done now, and how many seconds that will take."""


@dataclass
class Turns:
    """One arm, turn by turn."""

    throughput: list[float] = field(default_factory=list)
    service_cpu_ms: list[float] = field(default_factory=list)
    """Of the service's process tree, for each answer."""
    generator_share: list[float] = field(default_factory=list)
    """What the process that asks used of all cores."""
    errors: dict[str, int] = field(default_factory=dict)
    p99_ms: list[float] = field(default_factory=list)


def choose_users(data: Dataset, count: int) -> list[tuple[str, int]]:
    """Client and user id, in turn over all clients; fewer where there are fewer."""
    held = [(client, data.shard(client).users.tolist()) for client in data.clients]
    longest = max(len(users) for _, users in held)
    dealt = [(c, users[at]) for at in range(longest) for c, users in held if at < len(users)]
    return dealt[:count]


def bench_run(run: str, settings: Settings, say: Say) -> dict[str, Any]:
    """All figures of a run that is served for it.

    Raises:
        FellrayError: there is no such run, or a service does not start.
    """
    users = choose_users(Dataset(read_run(run).config.data.path), settings.users)
    questions = [ask_for(client, user) for client, user in users]
    before = load_average()
    with Generator() as generator, ExitStack() as up:
        with ExitStack() as others:
            # one after the other: a Ray that starts beside two others may give up
            say("the service starts", 15)
            ours = up.enter_context(start_run(run, settings.settings)).wait()
            say("the unbatched service starts", 15)
            unbatched = start_run(run, [*settings.settings, "rows=1"])
            alone = others.enter_context(unbatched).wait()
            say("stock Serve starts", 10)
            stock = others.enter_context(start_stock()).wait()
            services = {
                "service": (ours, questions),
                "unbatched": (alone, questions),
                "no-op": (ours, [NOOP]),
                "stock no-op": (stock, [Question("GET", "/")]),
                "roomy stock no-op": (stock, [Question("GET", ROOMY)]),
            }
            loop = _make_loop(run, settings, users)
            one_ms: list[float] = []
            arms = _take_turns(services, loop, one_ms, generator, settings, say)
        saturation = spread(arms["service"].throughput).median
        open_loops = _climb(ours, questions, saturation, generator, settings, say)
    results = {
        "run": run,
        "model": read_run(run).config.model.name,
        "cores": len(os.sched_getaffinity(0)),
        "settings": asdict(settings),
        "users": len(users),
        "clients": len({client for client, _ in users}),
        "tokens": asdict(spread(loop.lengths)),
        "one_forward_ms": asdict(spread(one_ms)),
        "arms": {name: asdict(turns) for name, turns in arms.items()},
        "open_loops": open_loops,
        "adapters": [],
    }
    if settings.adapters:
        with tempfile.TemporaryDirectory(prefix="fellray-bench-") as folder:
            model = read_run(run).config.model
            results["adapters"] = measure_adapters(
                Path(folder), model, settings.adapters, settings, say
            )
    after = load_average()
    results["load_average"] = [before, after]
    results["busy"] = max(before, after) > BUSY
    results["figures"] = judge(results)
    return results


def bench_at(run: str, target: Target, settings: Settings, say: Say) -> dict[str, Any]:
    """Saturation and latency of a service that runs already; its CPU is not known.

    Raises:
        FellrayError: there is no such run.
    """
    users = choose_users(Dataset(read_run(run).config.data.path), settings.users)
    questions = [ask_for(client, user) for client, user in users]
    before = load_average()
    with Generator() as generator:
        _warm(generator, target, questions, settings, say)
        say("closed loop", settings.seconds)
        closed = generator.ask(target, questions, _closed(len(questions), settings))
        turns = Turns()
        _note(turns, closed, None)
        service = Service(target, os.getpid())
        saturation = closed.tally.throughput
        open_loops = _climb(service, questions, saturation, generator, settings, say)
    after = load_average()
    for row in open_loops:
        del row["service_cpu_ms"]
    return {
        "run": run,
        "cores": len(os.sched_getaffinity(0)),
        "settings": asdict(settings),
        "users": len(users),
        "clients": len({client for client, _ in users}),
        "arms": {"service": asdict(turns)},
        "open_loops": open_loops,
        "adapters": [],
        "load_average": [before, after],
        "busy": max(before, after) > BUSY,
        "figures": [],
    }


def _make_loop(run: str, settings: Settings, users: Sequence[tuple[str, int]]) -> ForwardLoop:
    clients = {client for client, _ in users}
    args = Args(run=run, threads=CORES, adapters=len(clients), rows=settings.connections)
    return ForwardLoop(args, users)


def _take_turns(
    services: Mapping[str, tuple[Service, Sequence[Question]]],
    loop: ForwardLoop,
    one_ms: list[float],
    generator: Generator,
    settings: Settings,
    say: Say,
) -> dict[str, Turns]:
    arms = {name: Turns() for name in ("service", "bare loop", *list(services)[1:])}
    order = draw_owners(
        settings.order, weigh_zipf(len(loop.questions), settings.zipf), settings.seed
    )
    for service, questions in services.values():
        _warm(generator, service.target, questions, settings, say)
    _run_loop(loop, order, settings, 1.0)
    names = list(arms)
    for turn in range(settings.turns):
        for name in names:
            say(f"turn {turn + 1} of {settings.turns}: {name}", settings.seconds)
            if name == "bare loop":
                arms[name].throughput.append(_run_loop(loop, order, settings, settings.seconds))
                one_ms += _time_one(loop, order)
                continue
            service, questions = services[name]
            used = service.cpu()
            answered = generator.ask(service.target, questions, _closed(len(questions), settings))
            _note(arms[name], answered, service.cpu() - used)
        names.reverse()
    return arms


def _warm(
    generator: Generator,
    target: Target,
    questions: Sequence[Question],
    settings: Settings,
    say: Say,
) -> None:
    say("warm-up", settings.seconds)
    load = Load(range(len(questions)), settings.seconds, connections=settings.connections)
    generator.ask(target, questions, load)


def _closed(count: int, settings: Settings) -> Load:
    order = draw_owners(settings.order, weigh_zipf(count, settings.zipf), settings.seed)
    return Load(order.tolist(), settings.seconds, connections=settings.connections)


def _note(turns: Turns, answered: Answered, cpu: float | None) -> None:
    tally = answered.tally
    turns.throughput.append(tally.throughput)
    if cpu is not None:
        turns.service_cpu_ms.append(1000 * cpu / max(1, tally.answered))
    turns.generator_share.append(tally.generator_cpu_s / tally.seconds / CORES)
    turns.p99_ms.append(tally.latency_ms.get("p99", float("nan")))
    add_errors(turns.errors, tally)


def _run_loop(loop: ForwardLoop, order: np.ndarray, settings: Settings, seconds: float) -> float:
    """Questions a second, in batches as large as there are connections."""
    at, answered, began = 0, 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        which = np.take(order, range(at, at + settings.connections), mode="wrap")
        answered += loop.answer(which.tolist())
        at += settings.connections
    return answered / (time.perf_counter() - began)


def _time_one(loop: ForwardLoop, order: np.ndarray, times: int = 10) -> list[float]:
    """Milliseconds of one question at a time; the middle of a few."""
    taken = []
    for at in order[:times].tolist():
        began = time.perf_counter()
        loop.answer([at])
        taken.append(1000 * (time.perf_counter() - began))
    return [spread(taken).median]


def _climb(
    service: Service,
    questions: Sequence[Question],
    saturation: float,
    generator: Generator,
    settings: Settings,
    say: Say,
) -> list[dict[str, Any]]:
    """Open loops at shares of saturation, or the one that was asked for."""
    rates = [(share, share * saturation) for share in SHARES]
    if settings.rate is not None:
        rates = [(settings.rate / saturation, settings.rate)]
    rows = []
    for share, rate in rates:
        seconds = settings.seconds * (5 if share == HELD or settings.rate else 2)
        say(f"Poisson, {rate:.0f} requests a second", seconds)
        order = draw_owners(
            settings.order, weigh_zipf(len(questions), settings.zipf), settings.seed
        )
        load = Load(order.tolist(), seconds, rate=rate, seed=settings.seed)
        used = service.cpu()
        answered = generator.ask(service.target, questions, load)
        used = service.cpu() - used
        tally = answered.tally
        latencies = np.sort(answered.latency_s * 1000).tolist()
        rows.append(
            {
                "share": share,
                "rate": rate,
                **asdict(tally),
                "service_cpu_ms": 1000 * used / max(1, tally.answered),
                "percentiles_ms": [find_quantile(latencies, p / 100) for p in range(1, 100)]
                if latencies
                else [],
            }
        )
    return rows
