"""What a person sees while a run goes on: a bar with the time left, and a line per round.

On a terminal the bar is live; elsewhere, in a job's log say, only the lines are printed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fellray.platform.config import RunConfig

console = Console(highlight=False)


def make_bar(*counts: ProgressColumn) -> Progress:
    """A bar with the time that has gone and is left; it vanishes at its end, and shows on terminals
    only. Args: counts: what stands behind the bar."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Display:
    """The live view of one run."""

    def __init__(self, config: RunConfig, folder: str, to_go: range, found: Iterable[str] = ()):
        """Args: found: what is to be said before the first round."""
        self._found = list(found)
        self._config = config
        self._to_go = to_go
        self._folder = folder
        self._progress = make_bar(MofNCompleteColumn(), TextColumn("rounds"))
        self._best = 0.0

    def __enter__(self) -> "Display":
        config, last = self._config, self._config.train.rounds
        done = last + 1 - len(self._to_go)
        resumed = f", going on after round {done - 1}" if done else ""
        self._progress.start()
        self._task = self._progress.add_task(config.name, total=last + 1, completed=done)
        console.print(
            f"[bold]{config.name}[/]: {config.method.kind}, seed {config.seed}, "
            f"{last} rounds{resumed}\neverything goes to {self._folder}\n"
            f"[dim]round 0 is the untrained start; {_measured(config)}: validation[/]"
        )
        self.warn(self._found)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, row: Mapping[str, Any]) -> None:
        """A committed round."""
        self.warn(event for event in row["events"] if event not in self._found)
        console.print("  " + "  ".join(_parts(row)))
        self._progress.advance(self._task)

    def warn(self, events: Iterable[str]) -> None:
        """What went wrong, and how it went on."""
        for event in events:
            console.print(f"  [yellow]! {event}[/]")

    def say(self, doing: str) -> None:
        """What happens after the last round."""
        self._progress.update(self._task, description=f"{self._config.name}: {doing}")


def _measured(config: RunConfig) -> str:
    ranking = config.attributes is None
    return "NDCG@10 and the worst client's" if ranking else "AUC of all samples, AUC of users"


def _parts(row: Mapping[str, Any]) -> list[str]:
    """Short enough for a terminal of 80 columns."""
    parts = [f"round {row['round']:>2}"]
    if row.get("loss") is not None:
        parts.append(f"loss {row['loss']:.4f}")
    if "worst_ndcg@10" in row:
        parts.append(f"NDCG@10 {row['validation'].get('ndcg@10', 0.0):.4f}")
        parts.append(f"worst {row['worst_ndcg@10']:.4f}")
    elif "validation" in row:
        parts += [f"{n.upper()} {row['validation'].get(n, 0.0):.4f}" for n in ("auc", "gauc")]
    if (privacy := row.get("privacy", {})).get("epsilon") is not None:
        parts.append(f"epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g}")
    parts.append(f"{row['bytes'] / 1e6:.0f} MB")
    if "samples_per_second" in row:
        parts.append(f"{row['samples_per_second']:.0f} hist/s")
    return [*parts, f"{row['seconds']:.0f} s"]
