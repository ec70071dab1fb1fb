"""What comes to the clients' events, and what leaves them for prepared data: several files at once.

It must not know what a file looks like, nor who sends or trains.
"""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from fellray.platform.errors import FellrayError
from fellray.platform.events import WAIT_S, Event, EventLog, decode


@dataclass(frozen=True)
class Conflict:
    """An event that cannot be stored: its id is another event's."""

    place: int
    """In the request."""


@dataclass(frozen=True)
class Stored:
    """What became of a request: all of it is on the disk now."""

    new: int
    known: int
    """Were there before, or twice in the request."""


@dataclass(frozen=True)
class Taken:
    """The beginning of a client's file, as far as it is part of prepared data."""

    bytes: int = 0
    count: int = 0
    """Events."""
    sha256: str = hashlib.sha256().hexdigest()
    """Of those bytes."""


def add_events(
    requests: Sequence[Sequence[tuple[str, Event]]],
    logs: Mapping[str, EventLog],
    wait_s: float = WAIT_S,
) -> list[Stored | Conflict]:
    """Store the events of several requests, each request wholly or not at all, each event once.

    Every file that is needed is held until all is on the disk, once for all requests. Whoever is
    killed in here may leave a request stored in part; it had no answer, and when it is sent again
    the rest is stored.

    Args:
        requests: clients and events.
        logs: the client's own.
        wait_s: how long other writers are waited for, of all files together.

    Returns:
        An answer for each request.

    Raises:
        FellrayError: as `EventLog.writing`.
    """
    clients = sorted({client for request in requests for client, _ in request})
    fresh: dict[str, dict[str, Event]] = {client: {} for client in clients}
    answers: list[Stored | Conflict] = []
    deadline = time.monotonic() + wait_s
    with ExitStack() as held:
        # all in one order: writers never wait for each other in a circle
        files = {
            client: held.enter_context(logs[client].writing(max(0.0, deadline - time.monotonic())))
            for client in clients
        }
        for request in requests:
            answer = _judge(request, logs, fresh)
            answers.append(answer)
            if isinstance(answer, Stored):
                for client, event in request:
                    if not logs[client].knows(event):
                        fresh[client][event.event_id] = event
        for client in clients:
            logs[client].append(files[client], list(fresh[client].values()))
    return answers


def take_events(path: str, since: Taken) -> tuple[Taken, list[Event]]:
    """What was added to a client's file since, and where the file ends now, on the disk.

    Raises:
        FellrayError: the file is damaged, or its beginning is not what was taken before.
    """
    log = EventLog(path)
    if not since.bytes and not os.path.exists(path):
        return since, []
    with log.writing(WAIT_S) as file:
        log.append(file, [])
        data = os.pread(file, os.fstat(file).st_size, 0)
    if hashlib.sha256(data[: since.bytes]).hexdigest() != since.sha256:
        raise FellrayError(
            f"{path}: its first {since.bytes} bytes are not those whose events were taken before; "
            "restore the file, or say where it is with --events"
        )
    lines = data[since.bytes :].splitlines()
    events = [event for line in lines if (event := decode(line))]
    taken = Taken(len(data), since.count + len(events), hashlib.sha256(data).hexdigest())
    return taken, events


def _judge(
    request: Sequence[tuple[str, Event]],
    logs: Mapping[str, EventLog],
    fresh: Mapping[str, Mapping[str, Event]],
) -> Stored | Conflict:
    """What will become of a request, after those that are accepted already."""
    own: dict[tuple[str, str], Event] = {}
    known = 0
    for place, (client, event) in enumerate(request):
        stored = logs[client].knows(event)
        other = fresh[client].get(event.event_id) or own.get((client, event.event_id))
        if stored is None or (other is not None and other != event):
            return Conflict(place)
        if stored or other:
            known += 1
        else:
            own[client, event.event_id] = event
    return Stored(len(own), known)
