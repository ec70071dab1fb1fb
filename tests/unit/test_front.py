"""The front: what of Ray's HAProxy stays on this machine, and ports that are taken."""

import http.server
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest
from certificate import write_certificate

from fellray.jobs import ports
from fellray.jobs.front import (
    OURS,
    describe_front,
    refuse_taken,
    wait_until_open,
)
from fellray.jobs.ports import find_ports
from fellray.platform.errors import FellrayError

TEMPLATE = """global
    log 127.0.0.1:514 local0 info
    log global
defaults
    errorfile 503 /somewhere
    balance leastconn
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
frontend open
    bind 0.0.0.0:8001
listen stats
  bind *:8404
"""


def test_what_ray_opens_to_everybody_stays_here(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(TEMPLATE)
    env = describe_front(tmp_path, "/bin/echo")
    for _ in range(2):  # Ray has it checked before it is used
        said = subprocess.run(
            [env["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.split() == ["-db", "-f", str(config)]
    assert config.read_text().splitlines() == [
        "global",
        "    log global",
        "defaults",
        f"    errorfile 503 {tmp_path}/503.http",
        "    balance hash var(txn.client)",
        "    hash-type consistent crc32 avalanche",
        "    hash-balance-factor 150",
        "    default-server weight 64",
        f"    errorfile 408 {tmp_path}/408.http",
        "frontend prometheus",
        "    bind 127.0.0.1:9101",
        "frontend http_frontend",
        "    acl is_small req.hdr_val(content-length) le 12288",
        "    http-request wait-for-body time 20s if METH_POST is_small",
        "    http-request set-var(txn.client) req.body,json_query('$.client') if METH_POST",
        "    bind 127.0.0.1:8000",
        "frontend open",
        "    bind 0.0.0.0:8001",
        "listen stats",
        "  bind 127.0.0.1:8404",
    ]
    assert env[OURS] == "/bin/echo"
    inside = [value for name, value in env.items() if name.endswith(("_PATH", "_LOC", "_FILE"))]
    assert inside
    assert all(value.startswith(str(tmp_path)) for value in inside)


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FellrayError, match=f"127.0.0.1:{port} cannot be listened on"):
            refuse_taken("127.0.0.1", port)
    refuse_taken("127.0.0.1", port)


@pytest.mark.parametrize("given", ["25000\t60999\n", "1024\t65535\n", None])
def test_ports_that_are_found_are_given_to_nobody_meanwhile(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    monkeypatch.setattr(ports, "_RANGE", file)
    if given is not None:
        file.write_text(given)
    found = find_ports(5)
    assert len(set(found)) == 5
    if given and given.startswith("25000"):
        assert all(20_000 <= port < 25_000 for port in found)
    for port in found:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_it_waits_until_somebody_answers(tls: bool, tmp_path: Path) -> None:
    class Late(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            Late.asked += 1
            self.send_response(200 if Late.asked == 3 else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Late) as server:
        if tls:
            key, certificate = write_certificate(tmp_path)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        wait_until_open("127.0.0.1", server.server_port, tls)
        server.shutdown()
    assert Late.asked == 3
