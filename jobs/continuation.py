"""Continue: a finished run goes on in a new one, which trains on the events that came since, too.

Every step can be repeated: whoever was interrupted runs the same command again. In this order: the
finished run names the new one, so that there is one; the data are extended; the new run begins with
a round of the finished one; it trains like any other.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fellray.jobs.train import train
from fellray.platform.additions import Batch, list_batches, read_batches
from fellray.platform.config import RunConfig
from fellray.platform.errors import FellrayError
from fellray.platform.extension import Added, extend, taken_of
from fellray.platform.handover import hand_over
from fellray.platform.intake import Taken, take_events
from fellray.platform.origin import (
    Continuation,
    Origin,
    event_folder,
    find_first,
    read_continuation,
    read_origin,
    write_record,
)
from fellray.platform.promotion import read_promotion
from fellray.platform.run import Run, open_run, read_run
from fellray.platform.shards import Dataset
from fellray.platform.storage import Storage

ROUNDS = 1
"""Trained by default."""
_MOST_NAMES = 10_000


def continue_run(
    path: str,
    rounds: int | None = None,
    events: str | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train on from the served round of a finished run, on its data and the events since.

    The new run lies beside the old one and its data beside the old data. It has the old one's
    config and seeds; its rounds go on with the old one's numbers. An event joins the training
    interactions of its client and is counted in its prior; what is held out stays what it was.
    Items that came after the training are among the new data's where an event names them.

    Args:
        path: the finished run.
        rounds: how many to train, `ROUNDS` by default.
        events: the folder of the events where it is not the run's.

    Returns:
        The new run's summary.

    Raises:
        FellrayError: there is no such run, it is not finished, is being trained, was continued
            already or has no new events; or as `train`.
    """
    old = read_run(path)
    with old.storage.lock("train"):
        _refuse_unfinished(old)
        plan = _plan(old, rounds)
        config = _prepare(old, plan, events, tell)
        new_data = Dataset(config.data.path)
        with open_run(config, new_data.sha256) as run:
            if run.own() != old.own():
                raise FellrayError(
                    f"{config.clients.own}: has changed since {old.storage} was trained; restore it"
                )
            write_record(run.storage, _origin(old, plan))
            facts = {"data_sha256": new_data.sha256}
            hand_over(config, old.rounds, run.rounds, plan.round, facts)
    return train(config)


def _plan(old: Run, rounds: int | None) -> Continuation:
    """What was begun, or what is begun now; the same until it is finished."""
    if plan := read_continuation(old.storage):
        new = old.storage.beside(plan.run)
        if Run(_config(old, plan), storage=new).is_finished():
            raise FellrayError(
                f"{old.storage}: was continued as {plan.run}, which has its events; those that "
                f"came since are taken by `fellray continue {new}`"
            )
        if rounds not in (None, plan.rounds):
            raise FellrayError(
                f"{old.storage}: its continuation {plan.run} was begun with --rounds "
                f"{plan.rounds}; say the same, or leave it out"
            )
        return plan
    served = read_promotion(old.storage).served
    round = old.best_round() if served is None else served
    return Continuation(_name(old), round, ROUNDS if rounds is None else rounds)


def _prepare(
    old: Run, plan: Continuation, events: str | None, tell: Callable[[str], None]
) -> RunConfig:
    """The new run's config; its data lie there, and the old run says who continues it."""
    config = _config(old, plan)
    data, path = Dataset(old.config.data.path), config.data.path
    if old.rounds.facts(plan.round)["data_sha256"] != data.sha256:
        raise FellrayError(
            f"{old.config.data.path}: holds other data than {old.storage} was trained on; restore "
            "that folder"
        )
    begun = read_continuation(old.storage) is not None
    if not (begun and path.exists()):
        if path.exists():
            raise FellrayError(f"{path}: the new data would go there; move that away")
        folder = event_folder(old.storage, events)
        if folder is None:
            raise FellrayError(
                f"{old.storage}: lies on no disk, so its events are elsewhere; say where with "
                "--events FOLDER, as the service does with events=FOLDER"
            )
        added = _take(data, Path(folder))
        if not added:
            before = sum(taken.count for taken in taken_of(data).values())
            raise FellrayError(
                f"{folder}: holds no events"
                + (f" after the {before} that {old.storage} was trained on" if before else "")
                + "; the service stores what is sent to POST /v1/events"
            )
        later = _find_later(data, find_first(old.storage), added)
        write_record(old.storage, plan)
        counts = extend(data, config.data, added, path, later)
        tell(
            f"{counts['events']} new events of {counts['clients']} clients are training "
            f"interactions in {path}"
        )
        if later:
            tell(f"{len(later.ids)} of their items came after the training: they are in it now")
        if counts["repeats"]:
            tell(
                f"{counts['repeats']} of them are what is held out of the same user: that test is "
                "no longer blind"
            )
    return config


def _take(data: Dataset, folder: Path) -> dict[str, Added]:
    before = taken_of(data)
    added = {}
    for client in data.clients:
        taken, events = take_events(str(folder / f"{client}.jsonl"), before.get(client, Taken()))
        if events:
            added[client] = Added(taken, events)
    return added


def _find_later(data: Dataset, first: Storage, added: Mapping[str, Added]) -> Batch | None:
    """Items that events name and the data do not have; None: there are none such."""
    named = [event.item_id for one in added.values() for event in one.events]
    strange = np.setdiff1d(np.array(named, np.int64), data.item_ids)
    names = list_batches(first) if len(strange) else []
    if not names:
        return None
    found = read_batches(first, names, data.manifest["encoder"]["sha256"], data.vectors.shape[1])
    ids, at = np.unique(found.ids, return_index=True)
    at = at[np.isin(ids, strange)]
    if not len(at):
        return None
    return Batch(
        found.ids[at],
        [found.titles[one] for one in at],
        [found.categories[one] for one in at],
        found.vectors[torch.from_numpy(at)],
    )


def _config(old: Run, plan: Continuation) -> RunConfig:
    """The old run's, but for where it lies, its data and its length."""
    tree = old.config
    return tree.model_copy(
        update={
            "name": plan.run,
            "storage": old.storage.parent(),
            "data": tree.data.model_copy(update={"path": tree.data.path.with_name(plan.run)}),
            "train": tree.train.model_copy(update={"rounds": plan.round + plan.rounds}),
        }
    )


def _name(old: Run) -> str:
    """The line's first run with the next free number."""
    first = _first(old)
    for number in range(1, _MOST_NAMES):
        name = f"{first}-{number}"
        taken = old.storage.beside(name).list() or old.config.data.path.with_name(name).exists()
        if not taken:
            return name
    raise FellrayError(f"{old.storage}: has {_MOST_NAMES} continuations beside it; remove old ones")


def _first(old: Run) -> str:
    origin = read_origin(old.storage)
    return origin.first if origin else old.storage.name()


def _origin(old: Run, plan: Continuation) -> Origin:
    return Origin(old.storage.name(), plan.round, _first(old))


def _refuse_unfinished(old: Run) -> None:
    if not old.is_finished():
        done = old.rounds.latest()
        raise FellrayError(
            f"{old.storage}: is not finished ({'no round' if done is None else f'round {done}'} of "
            f"{old.config.train.rounds}); go on with the command that began it, then continue"
        )


def main() -> None:
    """`python jobs/continuation.py RUN [ROUNDS]`, also under `ray job submit`."""
    path, *rest = sys.argv[1:]
    continue_run(path, int(rest[0]) if rest else None)


if __name__ == "__main__":
    main()
