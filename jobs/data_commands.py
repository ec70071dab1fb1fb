"""Commands before a run: a first config, this machine, the data, how much fits where.

Heavy imports wait until a command runs, so `--help` is quick.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fellray.jobs.console import (
    SHOWN_CLIENTS,
    ConfigFile,
    Overrides,
    command,
    console,
    interruptible,
    tell,
)


def init(
    path: Annotated[Path, typer.Argument(help="Where to write the config.")] = Path("fellray.yaml"),
    source: Annotated[
        str,
        typer.Option(
            help="`demo`, a data folder (MovieLens, RecBole, Amazon reviews, fellray's own), or a "
            "file: CSV, Parquet, .inter, .json.gz."
        ),
    ] = "demo",
    items: Annotated[Path | None, typer.Option(help="A file of items with titles.")] = None,
) -> None:
    """Write a first config, with every common setting explained."""
    from fellray.jobs.init import UNKNOWN, write_config

    columns = write_config(path, source, items)
    tell(f"{path} written.")
    for ours, theirs in columns.items():
        tell(f"  {ours:<11}{theirs}")
    if missing := [ours for ours, theirs in columns.items() if theirs == UNKNOWN]:
        tell(f"No column looks like {' or '.join(missing)}:")
        tell(f'write its name for each "{UNKNOWN}" in {path}, under data.columns.')
    if columns and "timestamp" not in columns:
        tell("No column looks like a timestamp: the order of the file's rows will count.")
    tell(f"Next: {command('prepare', path, None)}")


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A YAML file; without, the defaults.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine and its environment for what would go wrong; status 1 if broken."""
    from fellray.jobs.doctor import examine, show_findings
    from fellray.platform.config import load

    findings = examine(load(config, overrides or []))
    show_findings(findings)
    if any(one.status == "broken" for one in findings):
        raise typer.Exit(1)


def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Read interactions, divide them among clients, and write one shard per client.

    `data.source` is `demo`, a MovieLens folder (ml-100k, ml-1m, ml-32m), RecBole's atomic files,
    Amazon reviews (2018, 2023), fellray's own folder, or a CSV or Parquet file. `data.partition`
    says who is a client: kmeans, per_user, by_attribute or dirichlet.
    """
    from fellray.jobs.prepare import prepare as run
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    with interruptible("nothing was written"):
        manifest = run(loaded)
    if loaded.attributes is not None:
        from fellray.jobs.attributes import show_prepared

        show_prepared(loaded, manifest)
        tell(f"Next: {command('train', config, overrides)}")
        return
    counts = manifest["counts"]
    table = Table("client", "users", "train", "valid", "test", title=str(loaded.data.path))
    for name, entry in list(manifest["clients"].items())[:SHOWN_CLIENTS]:
        table.add_row(name, *(str(entry[k]) for k in ("users", "train", "valid", "test")))
    console.print(table)
    if len(manifest["clients"]) > SHOWN_CLIENTS:
        tell(f"the first {SHOWN_CLIENTS} of {len(manifest['clients'])} clients")
    tell(
        f"{counts['users']} users, {counts['items']} items, {counts['interactions']} interactions, "
        f"{len(manifest['clients'])} clients"
    )
    if left_out := manifest.get("left_out"):
        told = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in left_out.items())
        tell(f"left out, since the model reads titles: {told}")
    if loaded.data.k_core > 1:
        tell(f"left: users and items with {loaded.data.k_core} interactions or more (data.k_core)")
    tell(f"Next: {command('train', config, overrides)}")


def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Measure a few steps; say how many clients fit where, and what a round will take."""
    from fellray.jobs.plan import plan as run
    from fellray.jobs.plan import show_plan
    from fellray.platform.config import load

    loaded = load(config, overrides or [])
    with interruptible("nothing was written"):
        layout, work = run(loaded)
    show_plan(loaded, layout, work)
