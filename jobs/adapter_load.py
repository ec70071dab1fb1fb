"""Adapters by the thousand under load: more clients ask than a replica has room for.

The clients of one service are asked for in turns, the first 64 of them say and then all, so that
what slows the machine slows all of it. It must not know the other arms of the bench.
"""

import http.client
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fellray.jobs.adapter_run import make_adapter_run
from fellray.jobs.arrivals import draw_owners, weigh_zipf
from fellray.jobs.generator import Generator, Load, ask_for
from fellray.jobs.load_settings import Settings
from fellray.jobs.service import start_run
from fellray.jobs.tally import add_errors
from fellray.jobs.wire import Target
from fellray.platform.errors import FellrayError
from fellray.platform.model_config import ModelConfig
from fellray.platform.run import read_run
from fellray.platform.shards import Dataset

ROOM = 32
"""Clients whose adapters a replica holds."""
EXPONENT = 1.1


@dataclass(frozen=True)
class Pages:
    """What a recommender counted."""

    asked: float
    loaded: float


def measure_adapters(
    folder: Path,
    model: ModelConfig,
    counts: Sequence[int],
    settings: Settings,
    say: Callable[[str, float], None],
) -> list[dict[str, Any]]:
    """A row for each number of clients: throughput, p99 and errors, and how often a page was there.

    Args:
        folder: empty; about 0.3 MB a client for MiniLM.
    """
    say(f"{max(counts):,} clients with adapters of their own are made", max(counts) / 100)
    run = make_adapter_run(folder, max(counts), model, settings.seed)
    data = Dataset(read_run(run).config.data.path)
    users = [(client, int(data.shard(client).users[0])) for client in data.clients]
    questions = [ask_for(client, user) for client, user in users]
    rows: list[dict[str, Any]] = [
        {"clients": n, "throughput": [], "p99_ms": [], "hit_rate": [], "errors": {}, "sent": 0}
        for n in counts
    ]
    own = ["round=latest", f"adapters={ROOM}", f"shards={max(counts)}"]
    say("their service starts", 40)
    with start_run(run, [*own, *settings.settings]) as starting, Generator() as generator:
        service = starting.wait()

        def ask(row: dict[str, Any], seed: int, seconds: float) -> Any:
            weights = weigh_zipf(row["clients"], EXPONENT)
            order = draw_owners(settings.order, weights, seed).tolist()
            load = Load(order, seconds, connections=settings.connections)
            return generator.ask(service.target, questions[: row["clients"]], load)

        say("warm-up", settings.seconds)
        ask(rows[-1], settings.seed, settings.seconds)
        for turn in range(settings.turns):
            for row in rows[:: -1 if turn % 2 else 1]:
                say(f"turn {turn + 1}: {row['clients']:,} adapters", settings.seconds)
                before = read_pages(service.target)
                # another order every turn: the same one would find what it left behind
                tally = ask(row, settings.seed + turn + 1, settings.seconds).tally
                after = read_pages(service.target)
                row["throughput"].append(tally.throughput)
                row["p99_ms"].append(tally.latency_ms.get("p99", float("nan")))
                row["sent"] += tally.sent
                asked = max(1.0, after.asked - before.asked)
                row["hit_rate"].append(1 - (after.loaded - before.loaded) / asked)
                add_errors(row["errors"], tally)
    return rows


def read_pages(target: Target) -> Pages:
    """From `/metrics`; of one replica, where there are several.

    Raises:
        FellrayError: it does not say.
    """
    connection = http.client.HTTPConnection(target.host, target.port, timeout=30)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {target.token}"})
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = dict(
        re.findall(r"^fellray_serve_adapters_(\w+?)(?:_total)?(?:{.*})? (\S+)$", text, re.M)
    )
    try:
        return Pages(float(found["asked"]), float(found["loaded"]))
    except (KeyError, ValueError):
        raise FellrayError(f"{target.host}:{target.port}/metrics: counts no adapters") from None
