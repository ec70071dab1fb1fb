"""Ports of this machine, for servers that are about to be started. It must not know which."""

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

LOWEST = 20_000
"""Below are well-known ones, and those that `ray start` gives to its workers."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def find_ports(count: int) -> list[int]:
    """Ports that nobody uses now, each once.

    They are none that the system itself gives to outgoing connections, where it says which: until
    the server listens, on a busy machine, one of those is soon somebody else's.
    """
    found: list[int] = []
    candidates = range(LOWEST, _first_given())
    with ExitStack() as held:
        for port in random.SystemRandom().sample(candidates, min(50 * count, len(candidates))):
            if len(found) == count:
                break
            one = held.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
        while len(found) < count:
            one = held.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            found.append(int(one.getsockname()[1]))
    return found


def _first_given() -> int:
    """The lowest port that a connection may be given; `LOWEST` where that is not known."""
    try:
        return max(LOWEST, int(_RANGE.read_text("ascii").split()[0]))
    except (OSError, ValueError, IndexError):
        return LOWEST
