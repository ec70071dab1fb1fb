"""Ports of this machine, for servers that are about to be started. It must not know which."""

import socket
from contextlib import ExitStack


def find_ports(count: int) -> list[int]:
    """Ports that nobody uses now, each once."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
