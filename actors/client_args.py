"""What every client actor is made of; what is equal for all is shared once.

It must not know whether actors are processes, nor how what is shared gets there.
"""

import hashlib
import json
from collections.abc import Callable
from itertools import chain
from typing import Any

from fellray.actors.world import World
from fellray.platform.config import RunConfig
from fellray.platform.own import ALIKE, Own
from fellray.platform.privacy_config import NoPrivacy
from fellray.platform.rounds import Rounds
from fellray.platform.seating import deal
from fellray.platform.span import Remote

Share = Callable[[str, Any], Any]
"""A name and a value: the value, or what stands for it where it is needed."""


def make_client_args(
    config: RunConfig,
    world: World,
    remote: Remote,
    rounds: Rounds,
    share: Share,
) -> list[tuple[Any, ...]]:
    """Constructor arguments of every client actor; what is equal for all is shared once."""
    # workers may stand in another folder than the driver
    here = config.data.model_copy(update={"path": config.data.path.absolute()})
    privacy = config.privacy
    if not isinstance(privacy, NoPrivacy) and privacy.key is not None:
        privacy = privacy.model_copy(update={"key": privacy.key.absolute()})
    config = config.model_copy(update={"data": here, "privacy": privacy})
    backbone = share(f"client {world.key(config)}", world.client_side(config))
    catalogue = share(f"catalogue {world.key(config)}", world.catalogue)
    hosts = deal(sorted(world.seats), config.clients.together)
    seats = [{c: world.seats[c] for c in host} for host in hosts]
    owns = [world.own.select([*seat, *chain.from_iterable(seat.values())]) for seat in seats]
    common = (backbone, catalogue, remote, rounds)
    return [
        (config, i, share_names(share, seat), *common, share_own(share, own))
        for i, (seat, own) in enumerate(zip(seats, owns, strict=True))
    ]


def share_names(share: Share, names: Any) -> Any:
    """Ids or seats, under a name that follows from them: an actor's plain arguments must be few."""
    return share(f"names {hashlib.sha256(json.dumps(names).encode()).hexdigest()}", names)


def share_own(share: Share, own: Own) -> Any:
    """As `share_names`; nothing is shared where nothing is own."""
    if own == ALIKE:
        return own
    return share(f"own {hashlib.sha256(json.dumps(own.tree()).encode()).hexdigest()}", own)
