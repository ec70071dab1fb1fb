"""Cost: what one client needs, by the depth of the cut, beside a client with the whole model.

Every arm is a fresh actor that holds one client and trains the same histories; where the model is
cut, the trunk runs in a server actor of its own. Measured is what the operating system says about
the client's process, and the clock.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.progress import track
from rich.table import Table

from fellray.actors.pool import RayPool, Shared
from fellray.actors.remote import RayRemote
from fellray.actors.server import Server
from fellray.actors.session import connect
from fellray.actors.world import World, survey
from fellray.jobs.display import console
from fellray.jobs.finish import write_report
from fellray.jobs.measured import STATUS, Imported, SplitClient, Step, WholeClient
from fellray.jobs.timings import BUSY, load_average, spread
from fellray.jobs.whole import tokens_per_step
from fellray.platform import config as configs
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.places import Demand
from fellray.platform.rounds import Rounds
from fellray.platform.run import COSTS, Run
from fellray.platform.shards import Dataset
from fellray.platform.split import PARTS, SIDES, plan_cut

TURNS = 3
"""Fresh actors of every arm."""
STEPS = 4
"""Local steps of a timed round."""
MOST_CUTS = 6
"""Of a deeper model, this many cuts are measured, evenly spaced, the ends included."""
SCRATCH = "costs-scratch"
WHOLE = "whole"
"""The arm that needs no server."""


def measure_costs(config: RunConfig) -> dict[str, Any]:
    """Memory and time of one client for each cut, and with the whole model; writes `costs.json`
    into the run's folder, and its report again where there is one.

    Returns:
        What was measured under which conditions, and `rows`: one per arm, each measured quantity
        with `median`, `low`, `high` and `count`, and `ratio` of the medians to the whole model's.

    Raises:
        FellrayError: this system does not tell a process's peak memory.
    """
    if not STATUS.exists():
        raise FellrayError(f"--client-cost reads {STATUS}: run it on Linux")
    world = survey(config)
    cuts = choose_cuts(world.backbone.num_blocks, config.model.top)
    arms = {f"k={k}": _vary(config, k) for k in cuts} | {WHOLE: _vary(config, cuts[0])}
    run = Run(config)
    loads = [load_average()]
    steps: dict[str, list[Step]] = {name: [] for name in arms}
    peaks: dict[str, list[int]] = {name: [] for name in arms}
    imported: list[int] = []
    with connect(config, 1):
        held = {name: _hold(name, arm, world) for name, arm in arms.items()}
        for turn, name in enumerate(
            track(list(arms) * TURNS, description="Client costs", transient=True)
        ):
            rounds = Rounds(run.storage.sub(f"{SCRATCH}/{turn}"))
            if name == WHOLE:
                imported.append(_import_only(arms[name], world))
            step, peak = _measure(arms[name], world, name == WHOLE, rounds)
            steps[name].append(step)
            peaks[name].append(peak)
        run.storage.delete(SCRATCH)
    loads.append(load_average())
    rows = [held[name] | describe(steps[name], peaks[name], imported) for name in arms]
    costs = {
        "name": config.name,
        "model": config.model.name,
        "client": _learner(config),
        "batch_size": config.train.batch_size,
        "tokens_per_step": tokens_per_step(arms[WHOLE], (_learner(config),), world.catalogue),
        "threads": config.clients.threads,
        "engine": "torch",
        "turns": TURNS,
        "steps": STEPS,
        "load_average": loads,
        "busy": max(loads) > BUSY,
        "imports_bytes": asdict(spread(imported)),
        "rows": [row | {"ratio": compare_row(row, rows[-1])} for row in rows],
    }
    run.journal.write_json(COSTS, costs)
    console.print(f"Written: {run.storage}/{COSTS}")
    if run.storage.exists("summary.json"):
        write_report(run)
        console.print(f"Shown in: {run.storage}/report.html")
    return costs


def show_costs(costs: dict[str, Any]) -> None:
    """The table on the terminal; in brackets what it is of the whole model's."""
    table = Table(
        "client",
        "frozen M",
        "trained k",
        "peak MiB",
        "of it model",
        "step ms",
        "own work ms",
        "MB/step",
        title=f"{costs['name']}: one client, {costs['tokens_per_step']:.0f} tokens a step, "
        f"{costs['threads']} thread(s) on either side",
        box=box.SIMPLE,
    )
    for row in costs["rows"]:
        table.add_row(
            row["arm"],
            _cell(row, "frozen", 1e-6, ".1f"),
            f"{row['trained'] / 1e3:.1f}",
            _cell(row, "peak_bytes", 2**-20, ".0f"),
            _cell(row, "model_bytes", 2**-20, ".0f"),
            _cell(row, "step_s", 1e3, ".0f"),
            _cell(row, "own_s", 1e3, ".0f"),
            f"{row['bytes']['median'] / 1e6:.2f}",
        )
    console.print(table)
    imports = costs["imports_bytes"]["median"] / 2**20
    before, after = costs["load_average"]
    console.print(
        f"In brackets: share of the whole model's, trained by the same client in its own process, "
        f"no server. Medians of {costs['turns']} fresh actors each, in turn. Peak: VmHWM of the "
        f"client's process; 'of it model' is without the {imports:.0f} MiB of a process that has "
        "only loaded the code. 'step' waits for the server, 'own work' does not. Torch engine. "
        f"Load average {before:.1f} before, {after:.1f} after"
        + (": busy, read the shares" if costs["busy"] else "")
    )


def choose_cuts(num_blocks: int, top: int) -> list[int]:
    """Every k that leaves the trunk a block, or `MOST_CUTS` of them with both ends."""
    last = num_blocks - top - 1
    if last < MOST_CUTS:
        return list(range(last + 1))
    return [round(i * last / (MOST_CUTS - 1)) for i in range(MOST_CUTS)]


def describe(
    steps: Sequence[Step], peaks: Sequence[int], imported: Sequence[int]
) -> dict[str, Any]:
    """One arm's measured quantities, each as a spread over its actors."""
    base = spread(imported).median
    measured = {
        "peak_bytes": peaks,
        "model_bytes": [peak - base for peak in peaks],
        "step_s": [step.wall for step in steps],
        "own_s": [step.wall - step.waiting for step in steps],
        "bytes": [step.bytes for step in steps],
    }
    return {name: asdict(spread(values)) for name, values in measured.items()}


def compare_row(row: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    """Medians over the whole model's."""
    measured = ("peak_bytes", "model_bytes", "step_s", "own_s")
    ratio = {name: row[name]["median"] / whole[name]["median"] for name in measured}
    return ratio | {name: row[name] / whole[name] for name in ("frozen", "trained")}


def _vary(config: RunConfig, cut: int) -> RunConfig:
    """The same client and the same steps at another cut; equal threads, the same engine."""
    tree = config.model_dump(mode="json")
    tree["name"] = f"{config.name}-costs"
    tree["method"] = {"kind": "local"}
    tree["model"]["cut"] = cut
    tree["clients"]["gpu_denominator"] = 0  # the whole model is on the CPU
    tree["train"]["local_samples"] = STEPS * config.train.batch_size
    tree["server"] |= {"engine": "torch", "threads": config.clients.threads, "gpus": 0}
    return configs.parse(tree, "client cost")


def _learner(config: RunConfig) -> str:
    return sorted(Dataset(config.data.path).clients)[0]


def _sides(arm: str) -> Sequence[str]:
    return PARTS if arm == WHOLE else SIDES


def _hold(arm: str, config: RunConfig, world: World) -> dict[str, Any]:
    """What the client's process holds: transformer blocks, frozen and trained parameters."""
    cut = plan_cut(world.backbone, config.model)
    sides = _sides(arm)
    prefixes = [prefix for side in sides for prefix in cut.prefixes(side)]
    arrays = world.backbone.select(prefixes).arrays.values()
    sites = [site for side in sides for site in cut.sites[side]]
    return {
        "arm": arm,
        "cut": None if arm == WHOLE else config.model.cut,
        "blocks": sum(len(cut.blocks[side]) for side in sides),
        "frozen": sum(array.size for array in arrays if array.dtype.kind == "f"),
        "trained": sum(site.num_parameters(config.model.lora.r) for site in sites),
    }


def _measure(config: RunConfig, world: World, whole: bool, rounds: Rounds) -> tuple[Step, int]:
    """A step and the peak memory of a client in fresh actors."""
    learner, key = _learner(config), world.key(config)
    catalogue = Shared(f"catalogue {key}", world.catalogue)
    pools: list[RayPool] = []
    try:
        if whole:
            model = Shared(f"whole {key}", world.backbone)
            row = (config, learner, model, catalogue)
            pools.append(RayPool(WholeClient, [row], _demand(config), _ignore))
        else:
            trunk = Shared(f"trunk {key}", world.trunk_side(config))
            far = Demand("server", 1, config.server.cpus, 0.0)
            pools.append(RayPool(Server, [(config, (learner,), trunk, rounds)], far, _ignore))
            sides = Shared(f"client {key}", world.client_side(config))
            remote = RayRemote(pools[0].handles)
            near = (config, learner, sides, catalogue, remote, rounds)
            pools.append(RayPool(SplitClient, [near], _demand(config), _ignore))
            staged = [one for pool in pools for files in pool.map("stage_start") for one in files]
            rounds.commit(0, staged, {})
        client = pools[-1]
        client.map("step")  # first touches
        (step,) = client.map("step")
        (peak,) = client.map("peak_bytes")
        return step, peak
    finally:
        for pool in pools:
            pool.close()


def _import_only(config: RunConfig, world: World) -> int:
    pool = RayPool(Imported, [(world.backbone.select(()),)], _demand(config), _ignore)
    try:
        (peak,) = pool.map("peak_bytes")
        return int(peak)
    finally:
        pool.close()


def _demand(config: RunConfig) -> Demand:
    return Demand("client", 1, config.clients.cpus, 0.0)


def _ignore(loss: str) -> None:
    """An actor that is lost and begun again costs this turn its time, and nothing else."""


def _cell(row: dict[str, Any], name: str, scale: float, form: str) -> str:
    value = row[name]["median"] if isinstance(row[name], dict) else row[name]
    return f"{format(value * scale, form)} ({row['ratio'][name]:.0%})"


def main() -> None:
    """`python jobs/cost.py CONFIG [key=value ...]`, as `fellray compare CONFIG --client-cost`."""
    path, *overrides = sys.argv[1:]
    show_costs(measure_costs(configs.load(path, overrides)))


if __name__ == "__main__":
    main()
