"""A handover: the state of a committed round, put down as the first rounds of another run.

The rounds keep their numbers, so that draws go on where they were. It must not know who trains, nor
on what data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fellray.platform.bank import state_names
from fellray.platform.config import RunConfig
from fellray.platform.manifest import Staged
from fellray.platform.rounds import Rounds
from fellray.platform.slots import WRITTEN

METHOD = "method."
"""Names of what a method's server step keeps in a round begin so."""
_SHARED = ("values", "moment1", "moment2", "steps")


def hand_over(
    config: RunConfig, old: Rounds, new: Rounds, round: int, facts: Mapping[str, Any]
) -> None:
    """Commit the start and a round of one run in another; what is there already stays.

    Args:
        config: of both, as far as their tensors go.
        round: a committed round of `old`.
        facts: as `Rounds.commit`.

    Raises:
        FellrayError: a page is damaged, or the storage refuses.
    """
    latest = new.latest()
    for at in sorted({0, round}):
        if latest is None or latest < at:
            new.commit(at, _copy(config, old, new, at), facts)


def _copy(config: RunConfig, old: Rounds, new: Rounds, round: int) -> list[Staged]:
    """Every page that is somebody's state at a round and was not so from the start."""
    staged: list[Staged] = []
    for part in ("client", "trunk"):
        of_owners: dict[tuple[str, ...], list[str]] = {}
        for name in state_names(part, config.train.moments == "keep", config.method.local()):
            owners = old.owners(round, name)
            since = old.page_rounds(round, owners, name) if owners else []
            mine = tuple(c for c, at in zip(owners, since, strict=True) if at > 0 or not round)
            of_owners.setdefault(mine, []).append(name)
        for group, (owners_, names) in enumerate(of_owners.items()):
            staged += _stage(old, new, round, f"{part}-{group}", owners_, names)
    held = [name for name in old.shared(round) if name.startswith(METHOD)]
    if held:
        kept = {name: old.load_shared(round, name) for name in held}
        staged.append(new.stage(round, "method", (), kept))
    if config.server.shared_adapter:
        shared = {f"shared.{kind}": old.load_shared(round, f"shared.{kind}") for kind in _SHARED}
        staged.append(new.stage(round, "shared", (), shared))
    return staged


def _stage(
    old: Rounds,
    new: Rounds,
    round: int,
    holder: str,
    clients: Sequence[str],
    names: Sequence[str],
) -> list[Staged]:
    few = (clients[at : at + WRITTEN] for at in range(0, len(clients), WRITTEN))
    return [
        new.stage(round, f"{holder}-{number}", some, old.load(round, some, names))
        for number, some in enumerate(few)
    ]
