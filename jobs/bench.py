"""Bench: what the split, the merged batch, the protocol and the engine cost, with MiniLM's weights.

All processes are held on the same two cores. It trains on the demo data, in a folder that is gone
afterwards, and takes minutes.
"""

import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers.utils import logging as transformers_logging

from fellray.actors.session import connect
from fellray.actors.world import survey
from fellray.jobs.display import console
from fellray.jobs.figures import (
    CORES,
    TURNS,
    Figure,
    count_bytes,
    measure_batching,
    measure_engines,
    measure_round,
    measure_split,
)
from fellray.jobs.prepare import prepare
from fellray.jobs.timings import BUSY, load_average
from fellray.platform import config as configs
from fellray.platform.journal import Journal
from fellray.platform.storage import Storage

CLIENTS = 5
NEVER = 1_000_000
"""A round that does not come: nothing is evaluated in between."""


def bench(folder: Path) -> dict[str, Any]:
    """All figures. `folder` is for data and rounds that nobody keeps."""
    tree = {
        "name": "bench",
        "storage": str(folder / "runs"),
        "data": {
            "path": str(folder / "data"),
            "partition": {"kind": "kmeans", "num_clients": CLIENTS},
        },
        "train": {"rounds": NEVER},
        "evaluation": {"every": NEVER},
    }
    config = configs.parse(tree, "bench")
    before = load_average()
    prepare(config)
    world = survey(config)
    with connect(config, CLIENTS):
        figures = [
            _say(measure_split(config, world, threads, crews))
            for threads, crews in itertools.product((1, CORES), (1, 2))
        ]
        figures += [
            _say(measure_batching(config, world, tokens, threads))
            for threads, tokens in itertools.product((1, CORES), (16, 64))
        ]
        figures.append(_say(measure_round(config, world)))
        figures.append(_say(measure_engines(config, world)))
    after = load_average()
    return {
        "cores": CORES,
        "turns": TURNS,
        "load_average": [before, after],
        "busy": max(before, after) > BUSY,
        "figures": figures,
        "bytes": count_bytes(config, world),
    }


def show(results: Mapping[str, Any]) -> None:
    """Two tables: ratios, and bytes."""
    table = Table("figure", "ratio", "of CPU", "goal", "bits", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for figure in results["figures"]:
        goal = figure["goal"]
        met = {True: " met", False: " missed", None: ""}[figure["met"]]
        table.add_row(
            figure["name"],
            "{median:.2f} ({low:.2f}-{high:.2f})".format(**figure["ratio"]),
            f"{figure['ratio_cpu']:.2f}" if figure["ratio_cpu"] else "",
            f"{goal[0]} {goal[1]}{met}" if goal else "",
            {True: "equal", False: "DIFFER", None: ""}[figure.get("equal_bits")],
        )
    console.print(table)
    for figure in results["figures"]:
        for name, part in figure.get("parts", {}).items():
            console.print(f"{figure['name']}: {name} x{part['median']:.2f}", soft_wrap=True)
        if "without_loading" in figure:
            console.print(
                f"{figure['name']}: x{figure['without_loading']['median']:.2f} without the "
                f"{figure['loading_s']:.1f} s of loading the model"
            )
    sent = results["bytes"]
    table = Table("bytes per client and round", "MB", "over full-model FedAvg", box=box.SIMPLE)
    for kind, count in sorted(sent["by_kind"].items(), key=lambda item: -item[1]):
        table.add_row(f"  {kind}", f"{count / 1e6:.3f}", "")
    for name, count in sent["bytes"].items():
        table.add_row(name, f"{count / 1e6:.3f}", f"{sent['over_full_model'][name]:.4f}")
    console.print(table)
    before, after = results["load_average"]
    console.print(
        f"{results['cores']} cores, medians of at least {results['turns']} turns, lowest and "
        f"highest in brackets; {sent['samples']} histories per client and round. Load average "
        f"{before:.1f} before, {after:.1f} after"
        + (
            ": busy, so run it again; where two threads wait for each other, even ratios mislead"
            if results["busy"]
            else ""
        )
    )


def _say(figure: Figure) -> Figure:
    console.print(f"{figure['name']}: {figure['ratio']['median']:.2f}", soft_wrap=True)
    return figure


def main() -> None:
    """`python -m fellray.jobs.bench [PATH]`: prints the tables and writes PATH, `runs/bench.json`
    by default."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bench.json")
    # Ray's actors would step back behind the arms in this process, and a GPU would take some arms
    os.environ |= {"RAY_worker_niceness": "0", "CUDA_VISIBLE_DEVICES": ""}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(1)  # until a figure says otherwise: more threads than cores wait in turn
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a load report for every reload
    warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
    with tempfile.TemporaryDirectory() as folder:
        results = bench(Path(folder))
    show(results)
    Journal(Storage(path.parent)).write_json(path.name, results)
    console.print(f"Written: {path}", soft_wrap=True)


if __name__ == "__main__":
    main()
