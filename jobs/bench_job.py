"""`fellray bench serve`: from the words of a command to files and a table."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fellray.jobs.bench_serve import SHARES, bench_at, bench_run
from fellray.jobs.display import console
from fellray.jobs.load_display import show_load, show_progress
from fellray.jobs.load_page import write_load_page
from fellray.jobs.load_settings import CORES, Settings
from fellray.jobs.wire import Target
from fellray.platform.errors import FellrayError
from fellray.platform.journal import Journal
from fellray.platform.storage import Storage
from fellray.serve.client import TOKEN

NAME = "bench-serve"


def bench_serve(run: str, out: Path, at: str | None, adapters: str, **told: Any) -> None:
    """Measure, show, and write `bench-serve.json` and `bench-serve.html` into a folder.

    Raises:
        FellrayError: a word of the command means nothing, or as `bench_run`.
    """
    counts = [word for word in adapters.split(",") if word.strip()]
    if bad := [word for word in counts if not word.strip().isdecimal() or not int(word)]:
        raise FellrayError(f"--adapters {adapters}: {bad[0]!r} is no number of clients")
    settings = replace(Settings(), **told, adapters=sorted(map(int, counts)))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with show_progress(_foresee(settings, at)) as say:
        if at is None:
            results = bench_run(run, settings, say)
        else:
            results = bench_at(run, _read_target(at), settings, say)
    show_load(results)
    storage = Storage(out)
    Journal(storage).write_json(f"{NAME}.json", results)
    storage.write(f"{NAME}.html", write_load_page(results).encode())
    console.print(f"Written: {out / NAME}.json, {out / NAME}.html")


def _read_target(at: str) -> Target:
    parts = urlsplit(at)
    if parts.scheme != "http" or not parts.hostname:
        raise FellrayError(
            f"--at {at}: write http://HOST:PORT; what speaks HTTPS only is not asked"
        )
    # a command line is everybody's to read
    return Target(parts.hostname, parts.port or 80, os.environ.get(TOKEN))


def _foresee(settings: Settings, at: str | None) -> float:
    """Seconds that all will take, roughly."""
    open_loops = 1 if settings.rate else len(SHARES)
    load = settings.seconds * (2 * open_loops + 4)
    if at is not None:
        return load
    own = 60 + settings.seconds * (4 + 5 * settings.turns)
    many = len(settings.adapters) * settings.turns * settings.seconds + settings.seconds
    return load + own + (many + 40 + max(settings.adapters) / 100 if settings.adapters else 0)
